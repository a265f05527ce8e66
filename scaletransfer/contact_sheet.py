"""One PNG of a set to look at: a grid of its images, what is known of each below it; suspicious ones come first."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scaletransfer.checked_sets import Group
from scaletransfer.image_features import decode_picture

COLUMNS, ROWS = 8, 5
CELL, MARGIN = 176, 8
LINES, LINE_HEIGHT, FONT_SIZE = 5, 15, 12
HEADER = 44
_PAPER, _INK, _QUIET, _ALARM = "#ffffff", "#000000", "#606060", "#b00020"
_MOST_FLAGGED = 2 / 3


def write_sheet(
    path: Path, groups: Sequence[Group], flags: Mapping[tuple[int, int], str], *, title: str, seed: int = 0
) -> int:
    """Write the contact sheet of the groups of one set; the number of images on it.

    flags: (number of the group, position in its rows) -> what is wrong with that image.  Flagged images come first
    and take two thirds of the sheet at most, if there are others; both kinds are drawn with `seed`.  Pictures show
    grey values as a network sees them.
    """
    chosen = _choose(groups, flags, np.random.default_rng(seed))
    rows = max(1, -(-len(chosen) // COLUMNS))
    step_x, step_y = CELL + MARGIN, CELL + LINES * LINE_HEIGHT + MARGIN
    sheet = Image.new("RGB", (COLUMNS * step_x + MARGIN, HEADER + rows * step_y + MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font, head = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(18)
    draw.text((MARGIN, 12), fitting(title, head, sheet.width - 2 * MARGIN), _INK, head)
    for number, (group, position) in enumerate(chosen):
        left = MARGIN + number % COLUMNS * step_x
        top = HEADER + number // COLUMNS * step_y
        flag = flags.get((group, position), "")
        picture = _picture(groups[group], position)
        frame = (left, top, left + CELL - 1, top + CELL - 1)
        draw.rectangle(frame, fill="#d8d8d8")
        if picture is not None:
            sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
        if flag:
            draw.rectangle(frame, outline=_ALARM, width=3)
        lines = [(text, _INK if line == 0 else _QUIET) for line, text in enumerate(_captions(groups[group], position))]
        lines[2:] = wrapped(lines[2][0], font, CELL, LINES - 2 - (1 if flag else 0), _QUIET)
        if flag:
            # the kinds alone: figures are in pixels.csv
            lines.insert(0, ("; ".join(part.partition(":")[0] for part in flag.split("; ")), _ALARM))
        if font.getlength(lines[bool(flag)][0]) > CELL:
            lines[bool(flag)] = (lines[bool(flag)][0][-16:], _INK)  # the digits; every key begins with the source
        for line, (text, colour) in enumerate(lines[:LINES]):
            draw.text((left, top + CELL + 2 + line * LINE_HEIGHT), fitting(text, font, CELL), colour, font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())
    return len(chosen)


def fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text`, cut with an ellipsis if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int, colour: str
) -> list[tuple[str, str]]:
    """(line, colour) for at most `lines` lines of whole words; the last one holds the rest and may be too long."""
    words, found = text.split(" "), [""]
    for number, word in enumerate(words):
        longer = f"{found[-1]} {word}".strip()
        if found[-1] and font.getlength(longer) > width:
            if len(found) == lines:
                found[-1] = " ".join([found[-1], *words[number:]])
                break
            found.append(word)
        else:
            found[-1] = longer
    return [(line, colour) for line in found]


def _choose(
    groups: Sequence[Group], flags: Mapping[tuple[int, int], str], rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Which images, flagged ones first; the others from all groups in proportion."""
    cells = COLUMNS * ROWS
    marked = sorted(flags)
    total = sum(len(group.rows) for group in groups)
    room = cells if total == len(marked) else max(cells - (total - len(marked)), int(cells * _MOST_FLAGGED))
    if len(marked) > room:
        marked = [marked[i] for i in sorted(rng.choice(len(marked), room, replace=False).tolist())]
    starts = np.cumsum([0] + [len(group.rows) for group in groups])
    chosen: list[tuple[int, int]] = []
    for number in rng.choice(total, min(total, cells + len(flags)), replace=False).tolist():
        group = int(np.searchsorted(starts, number, side="right")) - 1
        place = (group, number - int(starts[group]))
        if place not in flags and len(marked) + len(chosen) < cells:
            chosen.append(place)
    return marked + sorted(chosen)


def _captions(group: Group, position: int) -> list[str]:
    """Key, split and view and size, labels."""
    index, row = group.set.index, group.table[group.rows[position]]
    [key] = group.keys([position])
    view = index.views[row["view"]] if row["view"] >= 0 else ""
    features = group.features[position]
    where = " ".join(part for part in (group.split, view, f"{features['width']} x {features['height']}") if part)
    if index.task == "multiclass":
        return [key, where, index.label_names[row["label"]]]
    names = [name for name, state in zip(index.label_names, row["labels"].tolist(), strict=True) if state == 1]
    unsure = [f"{name}?" for name, state in zip(index.label_names, row["labels"].tolist(), strict=True) if state == -1]
    return [key, where, ", ".join(names + unsure) or "nothing positive"]


def _picture(group: Group, position: int) -> Image.Image | None:
    """The image scaled into a cell, None if it can't be read."""
    index, row = group.set.index, group.table[group.rows[position]]
    descriptor = os.open(index.path(group.split, int(row["shard"])), os.O_RDONLY)
    try:
        data = os.pread(descriptor, int(row["size"]), int(row["offset"]))
    finally:
        os.close(descriptor)
    try:
        picture = decode_picture(data)[0]
    except ValueError:
        return None
    if picture.mode == "I;16":
        values = np.asarray(picture, np.int64) * 255 // index.image.deep_white
        picture = Image.fromarray(np.minimum(values, 255).astype(np.uint8))
    picture = picture.convert("RGB")
    scale = CELL / max(picture.size)
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
