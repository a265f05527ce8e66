"""ImageNet: the 1,000 classes of ILSVRC2012 (arXiv 1409.0575), and all synsets ("ImageNet-21k").

Images are read where they lie: in folders, or in the official tars and tars of tars, without extracting them.  Keys,
order and labels of the records don't show which.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from scaletransfer.sources.base import Record, Source
from scaletransfer.sources.imagenet_labels import ACCEPTED, Answers, find_answers
from scaletransfer.sources.synsets import WNID, Image, Place, images_of, synsets_of_folder, synsets_of_tar
from scaletransfer.sources.tables import read_list

NO_SYNSET = "(none)"
"""The class without images of `ImageNet21k` under the paper's protocol."""
_LICENCE = "ImageNet terms of access: non-commercial research and education, no redistribution; owners keep the rights"
_KAGGLE = "ILSVRC/Data/CLS-LOC"
_BAR_DELAY = 3.0  # seconds


class _Synsets(Source):
    """What both have in common: a folder or a tar a synset."""

    task = "multiclass"
    licence = _LICENCE
    public = True

    def locate(self, records: Sequence[Record]) -> list[Record]:
        """As they are: the records of a folder or tar are those that it holds."""
        return list(records)

    def _training(self, places: Mapping[str, Place]) -> Iterator[Record]:
        labels = {name: number for number, name in enumerate(self.label_names)}
        # Where the images of a tar lie is known from its headers, which for a large one takes minutes.
        with tqdm(places.items(), unit="synset", desc=self.name, disable=None, delay=_BAR_DELAY, leave=False) as bar:
            for wnid, place in bar:
                images = images_of(self.root, place, self.skipped)
                if not images:
                    raise ValueError(f"{self.root / place.path} holds no image; add the synset's images or remove it.")
                for image in images:
                    # The set's own names begin with the synset; others need not be unique among all.
                    own = image.stem.startswith(f"{wnid}_")
                    yield image.record(image.stem if own else f"{wnid}/{image.stem}", "train", labels[wnid])

    def _count(self, what: str, found: int, official: int) -> None:
        if found != official:
            self.notes.append(f"{found:,} {what}; the official {self.name} has {official:,}.")


class ImageNet1k(_Synsets):
    """`root` holds the images for training and, for validation, their folders or the files that say their classes.

    Training, the first of: train/, ILSVRC2012_img_train/ (a folder or a tar a synset), ILSVRC2012_img_train.tar.
    Validation, the first of: val/, ILSVRC2012_img_val/ (a folder a synset, or all images in one),
    ILSVRC2012_img_val.tar.  Without folders for the synsets their labels come from ILSVRC2012_devkit_t12 (a folder or
    .tar.gz), imagenet_2012_validation_synset_labels.txt (one synset a line in the order of the images), or Kaggle's
    LOC_val_solution.csv.  Each may also lie in ILSVRC/Data/CLS-LOC.  The test images have no labels and are not read.

    Classes are the synsets of the training images, sorted; without those, of the validation images.
    """

    name = "imagenet1k"
    official = ("classes", 1_000), ("training images", 1_281_167), ("validation images", 50_000)

    def __init__(self, root: str | os.PathLike[str]) -> None:
        super().__init__(root)
        self._found_notes: list[str] = []
        self._found_skipped: list[str] = []
        bases = [base for base in (".", _KAGGLE) if (self.root / base).is_dir()]
        self._train = self._find_training(bases)
        self._valid, self._flat = self._find_validation(bases)
        self._answers: Answers | None = None
        if self._flat is not None:
            self._answers = find_answers(self.root, bases)
            if self._answers is None:
                raise ValueError(
                    f"{self.root / self._flat.path} has no folders for the synsets, and no file that says them is "
                    f"beside it: put one of {', '.join(ACCEPTED)} into {self.root}."
                )
        validated = set(self._valid) if self._answers is None else self._answers.synsets
        if not self._train and not validated:
            raise ValueError(
                f"{self.root} holds no images of ImageNet; --root must be the folder with train or "
                "ILSVRC2012_img_train.tar."
            )
        self.label_names = tuple(sorted(self._train or validated))
        unknown = sorted(set(self._valid) - set(self.label_names))
        if unknown:
            raise ValueError(
                f"{self.root / self._valid[unknown[0]].path} has no counterpart among the training images; a class "
                "without training images can't be learnt."
            )
        self.skipped = list(self._found_skipped)

    def __iter__(self) -> Iterator[Record]:
        self.skipped, self.notes = list(self._found_skipped), list(self._found_notes)
        self.left_out.clear()
        counts = [len(self.label_names), 0, 0]
        for record in self._training(self._train):
            counts[1] += 1
            yield record
        for record in self._validation():
            counts[2] += 1
            yield record
        for (what, official), found in zip(self.official, counts, strict=True):
            self._count(what, found, official)

    def _validation(self) -> Iterator[Record]:
        found: list[tuple[Image, int]] = []
        labels = {name: number for number, name in enumerate(self.label_names)}
        if self._flat is not None:
            assert self._answers is not None, "__init__ asks for them"
            for image in images_of(self.root, self._flat, self.skipped):
                wnid = self._answers.synset(image.stem)
                if wnid not in labels:
                    raise ValueError(
                        f"{self._answers.path} says {wnid} of the validation image {image.stem}, which has no training "
                        "images; complete them, or take its validation images out."
                    )
                found.append((image, labels[wnid]))
        for wnid, place in self._valid.items():
            found += [(image, labels[wnid]) for image in images_of(self.root, place, self.skipped)]
        found.sort(key=lambda entry: entry[0].stem)
        for (one, _), (other, _) in itertools.pairwise(found):
            if one.stem == other.stem:
                raise ValueError(f"{self.root}: {one.image} and {other.image} are one image; remove one of them.")
        for image, label in found:
            yield image.record(image.stem, "valid", label)

    def _find_training(self, bases: Sequence[str]) -> dict[str, Place]:
        for base in bases:
            for name in ("train", "ILSVRC2012_img_train"):
                folder = _below(base, name)
                synsets = synsets_of_folder(self.root, folder, self._found_notes, self._found_skipped)
                if synsets:
                    return dict(sorted(synsets.items()))
            archive = _below(base, "ILSVRC2012_img_train.tar")
            if (self.root / archive).is_file():
                synsets = synsets_of_tar(self.root, archive, self._found_skipped)
                if not synsets:
                    raise ValueError(f"{self.root / archive} holds no tars of synsets; download it again.")
                return dict(sorted(synsets.items()))
        return {}

    def _find_validation(self, bases: Sequence[str]) -> tuple[dict[str, Place], Place | None]:
        """Folders of synsets, or one place with all images."""
        for base in bases:
            for name in ("val", "ILSVRC2012_img_val"):
                folder, others = _below(base, name), list[str]()
                synsets = synsets_of_folder(self.root, folder, self._found_notes, others)
                if synsets:
                    self._found_skipped += others
                    return dict(sorted(synsets.items())), None
                if others:
                    return {}, Place(folder)
            archive = _below(base, "ILSVRC2012_img_val.tar")
            if (self.root / archive).is_file():
                return {}, Place(archive, tar=True)
        return {}, None


class ImageNet21k(_Synsets):
    """`root` holds, or its folder train holds, n00004475.tar and so on, or a folder a synset; or fall11_whole.tar or
    winter21_whole.tar, the tars of these tars.  All images are for training.

    Options: `classes`: a file, in `root` or elsewhere, with one synset a line: the classes, in its order, instead of
    all synsets that are there, sorted; others are passed over.  `protocol`: "corrected": the synsets are the classes;
    "paper": before them comes one without images, NO_SYNSET.  The published network has 21,842 outputs for 21,841
    synsets, as counted in the TFRecords that it was trained from; that the additional one is the first is our reading,
    as in lists of classes with a background.
    """

    name = "imagenet21k"
    official = 21_841
    archives = ("fall11_whole.tar", "winter21_whole.tar")

    def __init__(
        self, root: str | os.PathLike[str], *, classes: str | None = None, protocol: str = "corrected"
    ) -> None:
        super().__init__(root)
        if protocol not in ("corrected", "paper"):
            raise ValueError(f"There is no protocol {protocol!r}; give corrected or paper.")
        self.protocol = protocol
        self._found_notes: list[str] = []
        self._found_skipped: list[str] = []
        self._places = self._find()
        if classes is not None:
            self._places = self._chosen(classes)
        self.label_names = (NO_SYNSET, *self._places) if protocol == "paper" else tuple(self._places)
        self.skipped = list(self._found_skipped)

    def __iter__(self) -> Iterator[Record]:
        self.skipped, self.notes = list(self._found_skipped), list(self._found_notes)
        self.left_out.clear()
        yield from self._training(self._places)
        self._count("synsets", len(self._places), self.official)

    def _find(self) -> dict[str, Place]:
        for folder in (".", "train"):
            others: list[str] = []
            synsets = synsets_of_folder(self.root, folder, self._found_notes, others)
            if synsets:
                self._found_skipped += others
                return dict(sorted(synsets.items()))
        for archive in self.archives:
            if (self.root / archive).is_file():
                return dict(sorted(synsets_of_tar(self.root, archive, self._found_skipped).items()))
            if (self.root / f"{archive}.gz").is_file():
                raise ValueError(
                    f"Images can't be read one at a time from {self.root / archive}.gz; unpack it: a folder with the "
                    "tars of its synsets is enough."
                )
        raise ValueError(f"{self.root} holds no synsets; --root must be the folder with n00004475.tar and so on.")

    def _chosen(self, classes: str) -> dict[str, Place]:
        """The places of the synsets in the list, in its order."""
        path = self.root / classes if (self.root / classes).is_file() else Path(classes).expanduser()
        if not path.is_file():
            raise ValueError(f"The list of classes {classes} is not there; give the file by the option classes.")
        chosen = {}
        for wnid, line in read_list(path).items():
            if not WNID.fullmatch(wnid):
                raise ValueError(
                    f"{path}, line {line}: {wnid[:40]!r} is not a synset such as n00004475; mend the line."
                )
            if wnid not in self._places:
                # a network would get an output that nothing trains
                raise ValueError(
                    f"{path}, line {line}: the synset {wnid} is not in {self.root}; add its images or take it out of "
                    "the list."
                )
            chosen[wnid] = self._places[wnid]
        if not chosen:
            raise ValueError(f"{path} lists no synset; write one a line.")
        others = [wnid for wnid in self._places if wnid not in chosen]
        if others:
            self._found_notes.append(f"{len(others):,} synsets that {path.name} doesn't list were passed over.")
            self._found_skipped += [f"{self._places[wnid].path}: not in {path.name}" for wnid in others]
        return chosen


def _below(base: str, name: str) -> str:
    return name if base == "." else f"{base}/{name}"
