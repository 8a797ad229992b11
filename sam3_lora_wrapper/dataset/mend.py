"""The rules of COCO files: what is wrong with categories and images, and how it is mended.

A file goes in and its mended view comes out; the report says what was found. Values that follow
from others are filled in. What does not follow is an error: it stops a run, and only
`dataset_check --repair` keeps the mended view.
"""

import gc
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from sam3_lora_wrapper.dataset.image_files import TRANSPOSED, Header, open_image, read_header
from sam3_lora_wrapper.dataset.mend_annotations import Annotations, free_id, is_id, is_key
from sam3_lora_wrapper.dataset.progress import progress
from sam3_lora_wrapper.dataset.report import Report
from sam3_lora_wrapper.dataset.segmentations import same_shape
from sam3_lora_wrapper.errors import UserError

MAX_SIDE = 65535  # pixels; no image format that Pillow writes goes beyond


@contextmanager
def no_collection():
    """No garbage collection while millions of objects are made that all stay: it doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@no_collection()
def mend(coco: dict, images: "Images", report: Report, what: str = "images") -> dict:
    """The mended view of a file that read_json returned; the file itself is not altered.

    Args:
        coco: the file.
        images: the rules for images, new.
        report: gets every finding.
        what: said by the progress bar over the images.
    """
    named = (a.get("category_id") for a in coco["annotations"] if isinstance(a, dict))
    categories = Categories({key for key in named if is_id(key)}, report)
    for where, entry in _entries(coco, "categories", report):
        categories.read(where, entry)
    images.reserve(coco["images"])
    for where, entry in _entries(coco, "images", report, what):
        images.read(where, entry)
    rules = Annotations(images.by_key, categories.by_key, report)
    rules.reserve(coco["annotations"])
    annotations = [rules.read(where, entry) for where, entry in _entries(coco, "annotations", report)]
    return coco | {
        "categories": list(categories.by_name.values()),
        "images": [state.entry for state in images.by_file.values()],
        "annotations": [a for a in annotations if a is not None],
    }


def _entries(coco: dict, section: str, report: Report, what: str | None = None):
    """(where it is, entry) of each object of a section; anything else is left out."""
    for number, entry in enumerate(progress(coco[section], what) if what else coco[section]):
        where = f"{section}[{number}]"
        if isinstance(entry, dict):
            yield f"{where}, id {entry.get('id')!r}", entry
        else:
            report.drop(section, f"entry of {section} is not an object", where)


class Categories:
    """Rules for categories.

    Args:
        used: ids that annotations name.
        report: gets every finding.
    """

    def __init__(self, used: set[int], report: Report):
        self.used, self.report = used, report
        self.by_key: dict = {}               # id in the file -> mended entry
        self.by_name: dict[str, dict] = {}   # name, without regard to case -> mended entry

    def read(self, where: str, entry: dict) -> None:
        """Take in an entry."""
        key, name = entry.get("id"), entry.get("name")
        where = f"{where}, name {name!r}"
        if type(name) in (int, float):
            self.report.fill("category name is a number, not text", where, name)
            name = str(name)
        # Text that is no Unicode (half of a pair of surrogates) could not be written anywhere.
        name = name.encode(errors="ignore").decode().strip() if isinstance(name, str) else ""
        if not is_id(key):
            self.report.error("category id is not a whole number", where, None)
        elif key in self.by_key:
            self._repeated(where, key, name)
        elif name:
            self._add(where, key, entry | {"name": name})
        elif key in self.used:
            self.report.error("category without a name", where, None)
        else:
            self.report.drop("categories", "category without a name", where)

    def _repeated(self, where: str, key: int, name: str) -> None:
        if self.by_key[key]["name"] == name:
            self.report.drop("categories", "category listed twice", where)
        else:
            self.report.error("two categories share an id", where, None)

    def _add(self, where: str, key: int, entry: dict) -> None:
        first = self.by_name.setdefault(entry["name"].casefold(), entry)
        if first is not entry:
            self.report.join("categories", "two categories share a name", where, first["id"])
        self.by_key[key] = first


@dataclass
class ImageState:
    """What is known of an image while its annotations are read.

    Args:
        entry: the entry of `images`, mended.
        scale: factors by which mending stretches annotations in x and y.
        upright: whether mending takes the EXIF orientation out of the file.
    """

    entry: dict
    scale: tuple[float, float] = (1.0, 1.0)
    upright: bool = False


def inside(name) -> bool:
    """Whether a `file_name` names something in its folder, not a way out of it."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PureWindowsPath(name)  # parses both kinds of slashes
    return not path.anchor and ".." not in path.parts


class Images:
    """Rules for images.

    Args:
        folder: where the `file_name` entries are.
        report: gets every finding.
        look: how closely files are looked at: `exists`, `header` (size and orientation), or
            `decode` (every pixel).
    """

    def __init__(self, folder: Path, report: Report, look: str = "exists"):
        self.folder, self.report, self.look = folder, report, look
        self.by_key: dict[object, ImageState] = {}  # id in the file -> state
        self.by_file: dict[str, ImageState] = {}    # file_name -> state

    def reserve(self, entries: list) -> None:
        """Find the ids that are free for images that have none of their own."""
        self._next = free_id(entries)

    def read(self, where: str, entry: dict) -> None:
        """Take in an entry."""
        key, name = entry.get("id"), entry.get("file_name")
        where = f"{where}, {name!r}"
        if not is_key(key):
            return self.report.drop("images", "image without an id", where)
        if not inside(name):
            return self.report.drop("images", "file name is missing or leads out of the folder", where)
        name = str(PurePosixPath(name))
        if key in self.by_key and self.by_key[key].entry["file_name"] == name:
            self.report.drop("images", "image listed twice", where)
        elif key in self.by_key:
            self.report.error("two images share an id", where, None)
        elif name in self.by_file:
            self.by_key[key] = self.by_file[name]
            self.report.join("images", "two ids for one image", where, self.by_file[name].entry["id"])
        else:
            self._look(where, key, entry | {"file_name": name})

    def _look(self, where: str, key, entry: dict) -> None:
        """Take in an entry whose id and name are its own, after a look at its file."""
        path = self.folder / entry["file_name"]
        sizes = entry.get("width"), entry.get("height")
        known = all(type(s) in (int, float) and 1 <= s <= MAX_SIDE and s == int(s) for s in sizes)
        if not path.is_file():
            return self.report.drop("images", "image is missing", where)
        try:
            header = read_header(path) if self.look != "exists" or not known else None
            if self.look == "decode":
                open_image(path)
        except UserError as error:
            return self.report.drop("images", "image cannot be read", f"{where}: {error}")
        if not known:
            self.report.fill("width or height is missing", where, header.size)
            sizes = header.size
        state = ImageState(entry | {"width": int(sizes[0]), "height": int(sizes[1])})
        if header is None or self._fits(state, header, where):
            self._number(state.entry, key, where)
            self.by_key[key] = self.by_file[entry["file_name"]] = state

    def _number(self, entry: dict, key, where: str) -> None:
        if not is_id(key):
            entry["id"], self._next = self._next, self._next + 1
            self.report.error("image id is not a whole number", where, f"numbered {entry['id']}")

    def _fits(self, state: ImageState, header: Header, where: str) -> bool:
        """Whether an image is, or mended will be, of the size that the file declares."""
        declared = state.entry["width"], state.entry["height"]
        if declared == header.size:
            if header.orientation != 1:
                self.report.warning("EXIF orientation, applied when the image is loaded", where)
            return True
        said = "{}: {} x {} pixels, declared {} x {}".format(where, *header.size, *declared)
        if header.orientation in TRANSPOSED and declared == header.stored_size:
            self.report.error("declared size ignores the EXIF orientation", said, "orientation taken out")
            state.upright = True
            return True
        if not same_shape(header.size, declared):
            self.report.drop("images", "image of another size and shape than declared", said)
            return False
        self.report.error("image of another size than declared", said, "annotations scaled")
        state.scale = header.size[0] / declared[0], header.size[1] / declared[1]
        state.entry["width"], state.entry["height"] = header.size
        return True
