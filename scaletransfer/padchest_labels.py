"""What the tokens of PadChest's Labels column mean: the published rule, and the reviewed table.

Facts of the published protocol are those of the code released with arXiv 2106.00116; the tokens are those of the data
set's table of 2019 (arXiv 1901.07441). `padchest_tokens.csv` beside this module has one line a token: the findings it
stands for (none, one, or several, joined by "|") and why.
"""

from __future__ import annotations

import csv
import difflib
from functools import cache, lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

TOKEN_TABLE = "padchest_tokens.csv"

FINDINGS: tuple[str, ...] = (
    "Air Trapping",
    "Aortic Atheromatosis",
    "Aortic Elongation",
    "Atelectasis",
    "Bronchiectasis",
    "Cardiomegaly",
    "Consolidation",
    "Costophrenic Angle Blunting",
    "Edema",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Flattened Diaphragm",
    "Fracture",
    "Granuloma",
    "Hemidiaphragm Elevation",
    "Hernia",
    "Hilar Enlargement",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pleural_Thickening",
    "Pneumonia",
    "Pneumothorax",
    "Scoliosis",
    "Support Devices",
    "Tuberculosis",
)

# `paper`: a finding is 1 where its lower-case name, or one of these, is a part of the row's Labels text.
EXTRA_TERMS: dict[str, tuple[str, ...]] = {
    "Infiltration": (
        "infiltrates",
        "interstitial pattern",
        "ground glass pattern",
        "reticular interstitial pattern",
        "reticulonodular interstitial pattern",
        "alveolar pattern",
        "consolidation",
        "air bronchogram",
    ),
    "Pleural_Thickening": ("pleural thickening",),
    "Consolidation": ("air bronchogram",),
    "Hilar Enlargement": (
        "adenopathy",
        "pulmonary artery enlargement",
    ),
    "Support Devices": (
        "device",
        "pacemaker",
    ),
}

# `paper` drops these files, which were missing or truncated in its copy of the data set.
EXCLUDED_IMAGE_IDS: frozenset[str] = frozenset(
    (
        "216840111366964012283393834152009027091819347_00-007-136.png",
        "216840111366964012283393834152009033102258826_00-059-087.png",
        "216840111366964012283393834152009033140208626_00-059-118.png",
        "216840111366964012339356563862009072111404053_00-043-192.png",
        "216840111366964012373310883942009077082646386_00-047-124.png",
        "216840111366964012373310883942009117084022290_00-064-025.png",
        "216840111366964012373310883942009152114636712_00-102-045.png",
        "216840111366964012373310883942009170084120009_00-097-074.png",
        "216840111366964012373310883942009180082307973_00-097-011.png",
        "216840111366964012487858717522009280135853083_00-075-001.png",
        "216840111366964012558082906712009327122220177_00-102-064.png",
        "216840111366964012819207061112010281134410801_00-129-131.png",
        "216840111366964012819207061112010306085429121_04-020-102.png",
        "216840111366964012819207061112010307142602253_04-014-084.png",
        "216840111366964012819207061112010315104455352_04-024-184.png",
        "216840111366964012904401302362010336141343749_03-198-010.png",
        "216840111366964012904401302362010337093236130_03-198-079.png",
        "216840111366964012959786098432011033083840143_00-176-115.png",
        "216840111366964012989926673512011074122523403_00-163-058.png",
        "216840111366964012989926673512011083134050913_00-168-009.png",
        "216840111366964012989926673512011151082430686_00-157-045.png",
        "216840111366964013076187734852011291090445391_00-196-188.png",
        "216840111366964013590140476722013043111952381_02-065-198.png",
        "216840111366964013590140476722013049100117076_02-063-097.png",
        "216840111366964013590140476722013058110301622_02-056-111.png",
        "216840111366964013649110343042013092101343018_02-075-146.png",
        "216840111366964013686042548532013208193054515_02-026-007.png",
        "216840111366964013829543166512013353113303615_02-092-190.png",
        "216840111366964013962490064942014134093945580_01-178-104.png",
        "269300710246070740096540277379121868595_e7zsan.png",
    )
)


@cache
def reviewed() -> MappingProxyType[str, tuple[str, ...]]:
    """{token: the findings that it stands for} of the reviewed table, in its order (sorted): 193 tokens."""
    text = files("scaletransfer").joinpath(TOKEN_TABLE).read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines(), strict=True))
    table = {row["token"]: tuple(filter(None, row["finding"].split("|"))) for row in rows}
    assert len(table) == len(rows) and list(table) == sorted(table), (
        f"{TOKEN_TABLE} is not sorted, or has a token twice"
    )
    assert all(finding in FINDINGS for findings in table.values() for finding in findings), TOKEN_TABLE
    return MappingProxyType(table)


@cache
def findings_of(token: str, policy: Literal["paper", "corrected"]) -> tuple[str, ...]:
    """The findings of one token of the reviewed table.

    `paper`: those whose lower-case name or extra term is a part of the token.  Every term is a run of letters and
    single blanks, so it lies inside of one token of the Labels text if it lies in the text at all: a row's findings
    are those of its tokens together.
    """
    if policy == "corrected":
        return reviewed()[token]
    return tuple(name for name in FINDINGS if any(term in token for term in (name.lower(), *EXTRA_TERMS.get(name, ()))))


@lru_cache(maxsize=8)
def token_matrix(tokens: tuple[str, ...], policy: Literal["paper", "corrected"]) -> npt.NDArray[np.float32]:
    """float32 [len(tokens), 27]: 1 where the token (row) stands for the finding (column, order of FINDINGS), else 0.
    It is read-only, and the same array for the same arguments: a training run asks for it with every batch.

    Raises ValueError if `tokens` are not those of the reviewed table, in whatever order.
    """
    table = reviewed()
    for token in tokens:
        if token not in table:
            raise ValueError(f"The labels of padchest have {unknown_token(token)}.")
    missing = set(table).difference(tokens)
    if missing or len(tokens) != len(table):
        which = f"lack {min(missing)!r}" if missing else "name a token twice"
        raise ValueError(
            f"The labels of padchest {which}; they must be the {len(table)} tokens of {TOKEN_TABLE}. "
            "Make the shards again from the complete table."
        )
    matrix = np.zeros((len(tokens), len(FINDINGS)), np.float32)
    for row, token in enumerate(tokens):
        matrix[row, [FINDINGS.index(name) for name in findings_of(token, policy)]] = 1
    matrix.setflags(write=False)
    return matrix


def unknown_token(token: str) -> str:
    """Words for an error: the token, the nearest known one, and what to do."""
    near = difflib.get_close_matches(token, reviewed(), n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return (
        f"the token {token!r}, which the reviewed table lacks{hint}; mend it, or add it to scaletransfer/{TOKEN_TABLE}"
    )
