"""Any folder of images: one folder a class, with or without folders for the splits above them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from scaletransfer.files import inside
from scaletransfer.sources.base import SPLITS, Record, Source
from scaletransfer.sources.splits import check_share, uniform

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".dcm")
VALID_NAMES = ("val", "valid", "validation")

# What file managers and unpackers leave behind; nobody wants to hear of it. Hidden files are passed over as
# well.
_LITTER = {"thumbs.db", "desktop.ini", "__macosx", "icon\r"}


class ImageFolder(Source):
    """root/{train, val | valid | validation, test}/<class>/<image>, or root/<class>/<image>, all of it
    training.

    Classes are the names of the class folders, sorted; images may lie deeper. Order: split, class, path.
    Options: `valid_share`: the share of the training images, 0 <= share < 1, that becomes the validation
    split where there is no folder for it; drawn by a hash of `seed` and the path, so that an image's split
    doesn't depend on which others are there; a class keeps at least one training image. `folders`: the folder of
    each split relative to the root, where they have other names: {"train": "mod_train", "valid": "mod_test"}; "."
    is the root itself.
    """

    name = "image_folder"
    task = "multiclass"
    licence = "unknown (the user's own images)"
    # The images are the user's own and may show people: file names are hashed with the user's salt.
    public = False

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        valid_share: float = 0.0,
        seed: int = 0,
        folders: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(root)
        self.valid_share, self.seed = check_share(valid_share), seed
        self._ignored: list[str] = []
        self._splits = self._find_splits() if folders is None else self._named_splits(folders)
        if self.valid_share and "valid" in self._splits:
            raise ValueError(
                f"{self._splits['valid']} is the validation split already; leave valid_share out or remove the folder."
            )
        self._classes = {split: self._find_classes(folder) for split, folder in self._splits.items()}
        self.label_names = tuple(self._classes["train"])
        for split, names in self._classes.items():
            for name in names:
                if name not in self.label_names:
                    raise ValueError(
                        f"The class folder {self._splits[split] / name} has no counterpart in "
                        f"{self._splits['train']}; a class without training images can't be learnt."
                    )
        self.skipped = list(self._ignored)

    def __iter__(self) -> Iterator[Record]:
        self.skipped = list(self._ignored)
        for split in SPLITS:
            for name in self._classes.get(split, ()):
                folder = self._splits[split] / name
                images = self._images(folder)
                if not images:
                    raise ValueError(f"The class folder {folder} holds no image; add some or remove it.")
                held_out = self._held_out(images) if split == "train" else set()
                for image in images:
                    yield Record(
                        source_id=image,
                        split="valid" if image in held_out else split,
                        patient="",
                        image=image,
                        labels=self.label_names.index(name),
                        view="",
                    )

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have a folder."""
        return tuple(self._splits)

    def _named_splits(self, folders: Mapping[str, str]) -> dict[str, Path]:
        found = {}
        for split, name in folders.items():
            if split not in SPLITS:
                raise ValueError(f"There is no split {split!r}; splits are {', '.join(SPLITS)}.")
            found[split] = self.root / inside(name, self.root)
            if not found[split].is_dir():
                raise ValueError(f"{found[split]}, the folder of the split {split}, is not there or not a folder.")
        if "train" not in found:
            raise ValueError("The option folders must name the folder of the split train.")
        return found

    def _find_splits(self) -> dict[str, Path]:
        """Folder of each split; the root itself is "train" where there are no split folders."""
        valid = [name for name in VALID_NAMES if (self.root / name).is_dir()]
        if len(valid) > 1:
            raise ValueError(f"{self.root} holds both {valid[0]} and {valid[1]}; keep one validation folder.")
        if not (self.root / "train").is_dir():
            for name in valid:
                raise ValueError(f"{self.root} holds {name} but no train folder; put the training classes into train.")
            return {"train": self.root}
        folders = {"train": "train", "valid": valid[0] if valid else "valid", "test": "test"}
        for entry in sorted(os.listdir(self.root)):
            if entry not in folders.values() and not _litter(entry):
                self._ignored.append(f"{entry}: no split folder")
        return {split: self.root / name for split, name in folders.items() if (self.root / name).is_dir()}

    def _find_classes(self, folder: Path) -> list[str]:
        names = []
        for entry in sorted(os.listdir(folder)):
            if _litter(entry):
                continue
            if (folder / entry).is_dir():
                names.append(entry)
            else:
                self._ignored.append(f"{self._relative(folder / entry)}: outside of the class folders")
        if not names:
            raise ValueError(f"{folder} holds no class folders; images go to {folder}/<class>/<image>.")
        return names

    def _images(self, folder: Path) -> list[str]:
        """Paths of the images below a class folder relative to the root, sorted."""
        images = []
        for where, folders, files in os.walk(folder):
            folders[:] = [entry for entry in folders if not _litter(entry)]
            for entry in files:
                path = self._relative(Path(where) / entry)
                if entry.lower().endswith(IMAGE_SUFFIXES) and not _litter(entry):
                    images.append(path)
                elif not _litter(entry):
                    self.skipped.append(f"{path}: no image by its name")
        return sorted(images)

    def _held_out(self, images: list[str]) -> set[str]:
        if not self.valid_share:
            return set()
        draws = {image: uniform(self.seed, image) for image in images}
        chosen = {image for image in images if draws[image] < self.valid_share}
        return chosen - {max(images, key=lambda image: draws[image])} if len(chosen) == len(images) else chosen

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER
