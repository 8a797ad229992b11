"""The patch queue: its form, what it applies to, and what it refuses."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PATCHES = REPOSITORY / "patches"
SERIES = (PATCHES / "series").read_text().split()

sys.path.insert(0, str(PATCHES))
import apply  # noqa: E402


@pytest.fixture
def queue(tmp_path, monkeypatch) -> Path:
    """A copy of the queue that generates into tmp_path instead of the repository."""
    shutil.copytree(PATCHES, tmp_path / "patches", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(apply, "PATCHES", tmp_path / "patches")
    monkeypatch.setattr(apply, "REPOSITORY", tmp_path)
    monkeypatch.setattr(apply, "TARGET", tmp_path / "sam3")
    return tmp_path


def clone(folder: Path) -> Path:
    """A stand-in for a git clone: the pristine package in a folder of its own."""
    shutil.copytree(apply.find_source(None), folder / "sam3", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_series_and_files_name_each_other() -> None:
    assert sorted(SERIES) == sorted(p.name for p in PATCHES.glob("*.patch"))
    assert len(set(SERIES)) == len(SERIES)


@pytest.mark.parametrize("name", SERIES)
def test_header_says_what_why_and_where(name: str) -> None:
    header = (PATCHES / name).read_text().split("\n---\n")[0]
    subject, blank, *why = header.split("\n")
    assert subject.startswith("Subject: ") and blank == ""
    assert len(" ".join(why)) > 80
    assert re.search(r"^Reason: (upstreamable|local-only)$", header, re.M)
    assert re.search(r"^Forwarded: (no|not-needed|https://\S+)$", header, re.M)
    assert re.search(r"^Last-Update: \d{4}-\d\d-\d\d$", header, re.M)


@pytest.mark.parametrize("name", SERIES)
def test_context_is_one_line(name: str) -> None:
    """No more of upstream's code stands in a patch than finding the place takes."""
    for hunk in re.split(r"^@@ .*\n", (PATCHES / name).read_text(), flags=re.M)[1:]:
        lines = hunk.split("\ndiff --git")[0].rstrip("\n").split("\n")
        runs = "".join("c" if line.startswith(" ") or line == "" else "x" for line in lines).split("x")
        assert max(map(len, runs)) <= 2


def test_checksums_cover_exactly_the_patched_files() -> None:
    patched = {f for n in SERIES for f in re.findall(r"^\+\+\+ b/(\S+)", (PATCHES / n).read_text(), re.M)}
    assert {line.split()[1] for line in (PATCHES / "checksums").read_text().splitlines()} == patched


def test_generated_package_is_the_pristine_one_plus_the_patches() -> None:
    pristine, generated = apply.find_source(None), REPOSITORY / "sam3"
    patched = {line.split()[1] for line in (PATCHES / "checksums").read_text().splitlines()}
    differ = {
        f"sam3/{p.relative_to(pristine)}" for p in pristine.rglob("*.py")
        if p.read_bytes() != (generated / p.relative_to(pristine)).read_bytes()
    }
    assert differ == patched


def test_generating_is_idempotent_and_check_writes_nothing(queue: Path) -> None:
    source = apply.find_source(None)
    assert "not generated" in apply.generate(source, check=True)
    assert not (queue / "sam3").exists()
    assert "generated" in apply.generate(source, check=False)
    before = (queue / "sam3" / "train" / "trainer.py").stat().st_mtime_ns
    assert "up to date" in apply.generate(source, check=False)
    assert (queue / "sam3" / "train" / "trainer.py").stat().st_mtime_ns == before
    assert (queue / "sam3" / "assets" / apply.BPE).is_file()
    assert not list(queue.glob(".sam3-*"))


def test_clone_with_other_comments_is_accepted(queue: Path, tmp_path_factory) -> None:
    source = clone(tmp_path_factory.mktemp("clone"))
    file = source / "sam3" / "train" / "trainer.py"
    file.write_text("# pyre-unsafe\n\n" + file.read_text())
    assert "generated" in apply.generate(apply.find_source(str(source)), check=False)
    assert (queue / "sam3" / "train" / "trainer.py").read_text().startswith("# pyre-unsafe")


def test_changed_code_is_refused_and_nothing_is_touched(queue: Path, tmp_path_factory) -> None:
    apply.generate(apply.find_source(None), check=False)
    before = {p: p.read_bytes() for p in (queue / "sam3").rglob("*") if p.is_file()}
    source = clone(tmp_path_factory.mktemp("clone"))
    file = source / "sam3" / "train" / "trainer.py"
    file.write_text(file.read_text().replace("CORE_LOSS_KEY = ", "CORE_LOSS_KEY = 'x' + ", 1))
    with pytest.raises(apply.PatchError, match=r"file sam3/train/trainer.py differs from sam3 0.1.4: "):
        apply.generate(apply.find_source(str(source)), check=False)
    assert {p: p.read_bytes() for p in (queue / "sam3").rglob("*") if p.is_file()} == before


def test_patch_that_does_not_apply_is_named_and_nothing_is_touched(queue: Path) -> None:
    name = SERIES[0]
    broken = queue / "patches" / name
    broken.write_text(re.sub(r"^- ", "-x", broken.read_text(), count=1, flags=re.M))
    with pytest.raises(apply.PatchError, match=name):
        apply.generate(apply.find_source(None), check=False)
    assert not (queue / "sam3").exists() and not list(queue.glob(".sam3-*"))


def test_command_reports_a_bad_source_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, PATCHES / "apply.py", "--source", tmp_path],
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
