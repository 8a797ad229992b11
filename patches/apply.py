"""Generate ./sam3, the official package with this folder's patches applied.

    python patches/apply.py                  from the installed sam3 0.1.4
    python patches/apply.py --source CLONE   from a git clone of facebookresearch/sam3
    python patches/apply.py --check          verify only, write nothing

`series` lists the patches in order; each holds one concern and a header that says why.
`checksums` holds, for every file that a patch touches, the sha256 of its syntax tree, so a
file that differs from 0.1.4 in code is refused, and one that differs in comments is not.
"""

import argparse
import ast
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

VERSION = "0.1.4"
PATCHES = Path(__file__).resolve().parent
REPOSITORY = PATCHES.parent
TARGET = REPOSITORY / "sam3"
STAMP = "PATCHED"
BPE = "bpe_simple_vocab_16e6.txt.gz"
BPE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


class PatchError(Exception):
    """The package or a patch is not what the series was made for."""


def installed_package(distribution: str, folder: str) -> Path:
    """Folder of an installed distribution's package, found without importing it."""
    try:
        return Path(metadata.distribution(distribution).locate_file(folder))
    except metadata.PackageNotFoundError:
        raise PatchError(
            f"{distribution} is not installed. Run: pip install -r requirements.txt"
        ) from None


def find_source(clone: str | None) -> Path:
    """Folder of the pristine `sam3` package, with its version verified where it has one."""
    if clone is not None:
        source = Path(clone) / "sam3"
        if not (source / "model_builder.py").is_file():
            raise PatchError(f"{clone} holds no sam3/model_builder.py: not a clone of sam3")
        return source
    source = installed_package("sam3", "sam3")
    version = metadata.version("sam3")
    if version != VERSION:
        raise PatchError(
            f"sam3 {version} is installed, the patches are for {VERSION}. "
            "Run: pip install -r requirements.txt"
        )
    return source


def syntax_checksum(path: Path) -> str:
    """sha256 of a Python file's syntax tree: comments and layout do not count."""
    dump_all = {"show_empty": True} if sys.version_info >= (3, 13) else {}
    tree = ast.dump(ast.parse(path.read_text(encoding="utf-8")), **dump_all)
    return hashlib.sha256(tree.encode()).hexdigest()


def verify_checksums(source: Path) -> None:
    """Raise unless every file that a patch touches is that of sam3 0.1.4."""
    for line in (PATCHES / "checksums").read_text().splitlines():
        expected, name = line.split()
        path = source.parent / name
        if not path.is_file():
            raise PatchError(f"file {name} differs from sam3 {VERSION}: it is missing")
        if syntax_checksum(path) != expected:
            raise PatchError(
                f"file {name} differs from sam3 {VERSION}: its code has another checksum "
                f"({path}). Reinstall it: pip install --force-reinstall sam3=={VERSION}"
            )


def apply_series(folder: Path) -> int:
    """Apply the series inside `folder`, which holds `sam3/`; return the number of patches."""
    names = (PATCHES / "series").read_text().split()
    # Inside a repository, git skips paths of ignored folders without a word.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    for name in names:
        done = subprocess.run(
            ["git", "apply", "--whitespace=nowarn", str(PATCHES / name)],
            cwd=folder, env=environment, capture_output=True, text=True,
        )
        if done.returncode != 0:
            raise PatchError(f"{name} does not apply: {done.stderr.strip()}")
    return len(names)


def add_vocabulary(package: Path) -> None:
    """Copy the BPE vocabulary, which the wheel lacks, from open_clip_torch."""
    vocabulary = installed_package("open_clip_torch", "open_clip") / BPE
    if not vocabulary.is_file():
        raise PatchError(f"{vocabulary} is missing: reinstall open_clip_torch")
    if hashlib.sha256(vocabulary.read_bytes()).hexdigest() != BPE_SHA256:
        raise PatchError(f"{vocabulary} is not the vocabulary of SAM3: wrong checksum")
    (package / "assets").mkdir(exist_ok=True)
    shutil.copyfile(vocabulary, package / "assets" / BPE)


def build(source: Path, folder: Path) -> int:
    """Build the patched package as `folder/sam3`; return the number of patches."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(source, folder / "sam3", ignore=ignore)
    count = apply_series(folder)
    add_vocabulary(folder / "sam3")
    return count


def stamp_of(source: Path) -> str:
    """Identity of what would be generated: the source's files and this folder's."""
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*.py")) + sorted(p for p in PATCHES.iterdir() if p.is_file()):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def swap_in(package: Path) -> None:
    """Put the finished package in TARGET's place by renames on one file system."""
    old = package.parent / "old"
    if TARGET.exists():
        TARGET.rename(old)
    package.rename(TARGET)


def generate(source: Path, check: bool) -> str:
    """Verify, build and (unless `check`) install; return a line that says what was done."""
    verify_checksums(source)
    stamp = stamp_of(source)
    up_to_date = (TARGET / STAMP).is_file() and (TARGET / STAMP).read_text() == stamp
    if up_to_date and not check:
        return f"{TARGET} is up to date"
    with tempfile.TemporaryDirectory(prefix=".sam3-", dir=REPOSITORY) as folder:
        count = build(source, Path(folder))
        if check:
            state = "up to date" if up_to_date else "not generated or out of date"
            return f"all {count} patches apply to {source}; {TARGET} is {state}"
        (Path(folder) / "sam3" / STAMP).write_text(stamp)
        swap_in(Path(folder) / "sam3")
    return f"{TARGET} generated: sam3 {VERSION} with {count} patches"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", metavar="CLONE", help="git clone of facebookresearch/sam3")
    parser.add_argument("--check", action="store_true", help="verify, write nothing")
    args = parser.parse_args()
    try:
        print(generate(find_source(args.source), args.check))
    except PatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
