"""Files that a reader leaves out: labels without an image, images of formats that are not read."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from fusedet.data import annotation_cleaning
from fusedet.data.image_files import is_image_name, is_system_file, is_unread_image_name
from fusedet.data.readers.number_text import parse_number

_HEIF = (".heic", ".heif", ".hif")


@dataclass
class Problems:
    """Problems that are counted while a dataset is read, each with its first file."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, text: str, files: Iterable[str]) -> None:
        """Count files, which may be none, under a kind of problem."""
        for file in files:
            self.counts[text] = self.counts.get(text, 0) + 1
            self.examples.setdefault(text, file)


def find_left_out_yolo_files(
    problems: Problems, images: Iterable[str], folders: Iterable[str], get_label_path: Callable[[str], str]
) -> None:
    """Count label files without an image, and images of formats that are not read.

    Args:
        problems: Where they are counted.
        images: The images of the split.
        folders: The folders that the split names.
        get_label_path: Returns the label file of an image.
    """

    def get_label_folder(directory: str) -> str:
        return os.path.dirname(get_label_path(os.path.join(directory, "image.jpg")))

    folders = list(folders)
    directories = {os.path.dirname(image) for image in images} | set(_walk_folders(folders))
    labels: defaultdict[str, set[str]] = defaultdict(set)  # of the images on the disk, by folder of the labels
    for directory in _walk_folders(map(get_label_folder, folders)):
        labels[directory] = set()
    for directory in sorted(directories):
        names = _list_names(directory)
        labels[get_label_folder(directory)] |= {os.path.splitext(name)[0] for name in names if is_image_name(name)}
        add_unread_images(problems, directory, names)
    for label_folder, stems in sorted(labels.items()):
        names = _list_names(label_folder)
        is_mixed = label_folder in directories
        unpaired = (name for name in names if name.lower().endswith(".txt") and name[:-4] not in stems)
        paths = (os.path.join(label_folder, name) for name in unpaired)
        problems.add(annotation_cleaning.NO_IMAGE_FILE, (path for path in paths if _is_label_file(path, not is_mixed)))


def add_unread_images(problems: Problems, directory: str, names: Iterable[str]) -> None:
    """Count the images of a directory whose formats are not read."""
    for name in names:
        if is_unread_image_name(name):
            extension = os.path.splitext(name)[1].lower()
            text = annotation_cleaning.UNREAD_HEIF if extension in _HEIF else annotation_cleaning.UNREAD
            problems.add(text.format(extension=extension), [os.path.join(directory, name)])


def _walk_folders(folders: Iterable[str]) -> Iterator[str]:
    """Yield folders and all their subfolders, without those of the system."""
    for folder in folders:
        for directory, subfolders, _ in os.walk(folder):
            subfolders[:] = [name for name in subfolders if not is_system_file(name)]
            yield directory


def _list_names(directory: str) -> list[str]:
    """List the names of the files in a directory, sorted; none where it does not exist."""
    if not os.path.isdir(directory or "."):
        return []
    entries = os.scandir(directory or ".")
    return sorted(entry.name for entry in entries if entry.is_file() and not is_system_file(entry.name))


def _is_label_file(path: str, may_be_empty: bool) -> bool:
    """Return whether a text file holds YOLO labels: other texts, like lists of classes, may lie beside them."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            values = next((line for line in file if line.strip()), "").split()
        return all(map(_is_number, values)) and (len(values) >= 5 or (may_be_empty and not values))
    except (OSError, UnicodeDecodeError):
        return False


def _is_number(text: str) -> bool:
    try:
        parse_number(text)
    except ValueError:
        return False
    return True
