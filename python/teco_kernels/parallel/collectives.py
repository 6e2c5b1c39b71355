"""The collectives: every rank makes the same calls in the same order, with equal shapes and dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from teco_kernels.parallel.communicator import Communicator

_FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def all_reduce(x: Tensor, comm: Communicator, *, out: Tensor | None = None) -> Tensor:
    """Sum of the ranks' tensors, on every rank.

    Parameters
    ----------
    x : Tensor
        Any shape, contiguous, fp32, fp16 or bf16.
    comm : Communicator
        Over which ranks.
    out : Tensor, optional
        Written and returned instead of a new tensor; shape and dtype of `x`. May be `x` itself.

    Returns
    -------
    Tensor
        ``((x_0 + x_1) + x_2) + ...`` in fp32, rounded once: the same bits on every rank.

    Raises
    ------
    CommunicatorError
        A rank has ended, called something else, or did not come in time. `out` is then unspecified.

    Notes
    -----
    Up to a size that depends on the number of ranks alone, every rank reads the data of all others and adds it up
    (one-shot); beyond, each adds up a share, which the others fetch (two-shot). Bits do not depend on it.
    """
    if x.dtype not in _FLOATING or not x.is_contiguous():
        _check_summed(x)  # says what is wrong; the right case is worth a call less
    if out is None:
        out = torch.empty_like(x)
    elif out is not x:
        _check_out(out, "out", x, x.shape)
    comm.transport.all_reduce(out, x)
    return out


def all_reduce_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    comm: Communicator,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the ranks' tensors, the residual added, and the norm of that: what follows a row-parallel matmul.

    Parameters
    ----------
    x : Tensor
        ``[..., hidden_size]``, contiguous, fp32, fp16 or bf16; a partial sum of this rank.
    residual : Tensor
        Shape and dtype of `x`; equal on all ranks, if the results are to be.
    weight : Tensor
        ``[hidden_size]``, dtype of `x`; equal on all ranks.
    eps : float
        Added to the mean square.
    comm : Communicator
        Over which ranks.
    out : tuple of Tensor, optional
        ``(normed, new_residual)``, written and returned; may be ``(x, residual)`` themselves.

    Returns
    -------
    normed, new_residual : Tensor
        The very bits of ``fused_add_rms_norm(all_reduce(x, comm), residual, weight, eps)``.

    Raises
    ------
    CommunicatorError
        As `all_reduce`.
    """
    _check_summed(x)
    if x.dim() == 0 or weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"weight: expected shape [hidden_size] with the last dimension of x {list(x.shape)}, "
            f"got {list(weight.shape)}"
        )
    _check_like(weight, "weight", x, weight.shape)
    _check_like(residual, "residual", x, x.shape)
    if out is None:
        out = torch.empty_like(x), torch.empty_like(residual)
    else:
        _check_norm_out(*out, x, residual)
    normed, new_residual = out
    comm.transport.all_reduce_rms_norm(normed, new_residual, x, residual, weight, eps)
    return out


def all_gather(x: Tensor, comm: Communicator, *, out: Tensor | None = None) -> Tensor:
    """The tensors of all ranks, on every rank.

    Parameters
    ----------
    x : Tensor
        Any shape, contiguous; floating, integer or bool.
    comm : Communicator
        Over which ranks.
    out : Tensor, optional
        ``[world_size, *x.shape]``, dtype of `x`; written and returned instead of a new tensor.

    Returns
    -------
    Tensor
        ``[world_size, *x.shape]``: row r is what rank r gave.

    Raises
    ------
    CommunicatorError
        As `all_reduce`.
    """
    _check_contiguous(x)
    shape = torch.Size((comm.world_size, *x.shape))
    if out is None:
        out = x.new_empty(shape)
    else:
        _check_out(out, "out", x, shape, same_place=False)
    comm.transport.all_gather(out, x)
    return out


def reduce_scatter(x: Tensor, comm: Communicator, *, out: Tensor | None = None) -> Tensor:
    """A row of the sum of the ranks' tensors for each rank.

    Parameters
    ----------
    x : Tensor
        ``[world_size, ...]``, contiguous, fp32, fp16 or bf16.
    comm : Communicator
        Over which ranks.
    out : Tensor, optional
        ``x.shape[1:]``, dtype of `x`; written and returned instead of a new tensor.

    Returns
    -------
    Tensor
        ``x.shape[1:]``: row `comm.rank` of what `all_reduce` gives, bit for bit.

    Raises
    ------
    CommunicatorError
        As `all_reduce`.
    """
    _check_summed(x)
    if x.dim() == 0 or x.shape[0] != comm.world_size:
        raise ValueError(f"x: expected shape [{comm.world_size}, ...], a row per rank, got {list(x.shape)}")
    if out is None:
        out = x.new_empty(x.shape[1:])
    else:
        _check_out(out, "out", x, x.shape[1:], same_place=False)
    comm.transport.reduce_scatter(out, x)
    return out


def broadcast(x: Tensor, comm: Communicator, *, root: int = 0, out: Tensor | None = None) -> Tensor:
    """The tensor of one rank, on every rank.

    Parameters
    ----------
    x : Tensor
        Any shape, contiguous; floating, integer or bool. Only that of the root is read; it gives shape and dtype.
    comm : Communicator
        Over which ranks.
    root : int
        The rank whose tensor it is.
    out : Tensor, optional
        Written and returned instead of a new tensor; shape and dtype of `x`. May be `x` itself.

    Returns
    -------
    Tensor
        What the root gave.

    Raises
    ------
    CommunicatorError
        As `all_reduce`.
    """
    _check_contiguous(x)
    if not 0 <= root < comm.world_size:
        raise ValueError(f"root: expected a rank of 0 to {comm.world_size - 1}, got {root}")
    if out is None:
        out = torch.empty_like(x)
    elif out is not x:
        _check_out(out, "out", x, x.shape)
    comm.transport.broadcast(out, x, root)
    return out


def _check_contiguous(x: Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(f"x: expected a contiguous tensor, got strides {x.stride()}; call .contiguous()")


def _check_summed(x: Tensor) -> None:
    if x.dtype not in _FLOATING:
        raise TypeError(f"x: expected dtype float32, float16, bfloat16, got {str(x.dtype).removeprefix('torch.')}")
    _check_contiguous(x)


def _check_like(tensor: Tensor, name: str, x: Tensor, shape: torch.Size) -> None:
    # Calls are a matter of microseconds, and what is right is seen soonest as a whole.
    if tensor.shape == shape and tensor.dtype is x.dtype and tensor.is_contiguous() and tensor.device == x.device:
        return
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected the dtype of x ({x.dtype}), got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected the device of x ({x.device}), got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def _check_out(out: Tensor, name: str, x: Tensor, shape: torch.Size, *, same_place: bool = True) -> None:
    _check_like(out, name, x, shape)
    _check_apart(out, name, x, same_place=same_place)


def _check_norm_out(normed: Tensor, new_residual: Tensor, x: Tensor, residual: Tensor) -> None:
    if normed is x and new_residual is residual:
        return
    _check_out(normed, "out: normed", x, x.shape)
    _check_apart(normed, "out: normed", residual, same_place=False)
    _check_out(new_residual, "out: new_residual", residual, x.shape)
    _check_apart(new_residual, "out: new_residual", x, same_place=False)
    _check_apart(new_residual, "out: new_residual", normed, same_place=False)


def _check_apart(out: Tensor, name: str, x: Tensor, *, same_place: bool) -> None:
    begin, other = out.data_ptr(), x.data_ptr()
    if same_place and begin == other and out.numel() == x.numel():
        return
    if begin < other + x.numel() * x.element_size() and other < begin + out.numel() * out.element_size():
        raise ValueError(f"{name}: expected memory apart from that of what is read")
