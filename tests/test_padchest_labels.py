from __future__ import annotations

import csv
import time
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaletransfer.labels import LabelPolicy, targets, vocabulary
from scaletransfer.padchest_labels import (
    EXCLUDED_IMAGE_IDS,
    EXTRA_TERMS,
    FINDINGS,
    findings_of,
    reviewed,
    token_matrix,
)

TOKENS = tuple(reviewed())

# What a radiologist would say, against what a part of a word says: (token, corrected, paper).
DECIDED = (
    ("nodule", "Nodule", "Nodule"),
    ("multiple nodules", "Nodule", "Nodule"),
    ("pseudonodule", "", "Nodule"),
    ("nipple shadow", "", ""),
    ("tuberculosis", "Tuberculosis", "Tuberculosis"),
    ("tuberculosis sequelae", "", "Tuberculosis"),
    ("atypical pneumonia", "Pneumonia", "Pneumonia"),
    ("emphysema", "Emphysema", "Emphysema"),
    ("subcutaneous emphysema", "", "Emphysema"),
    ("pleural effusion", "Effusion", "Effusion"),
    ("loculated pleural effusion", "Effusion", "Effusion"),
    ("loculated fissural effusion", "Effusion", "Effusion"),
    ("pericardial effusion", "", "Effusion"),
    ("empyema", "Effusion", ""),
    ("hydropneumothorax", "Effusion|Pneumothorax", "Pneumothorax"),
    ("pneumomediastinum", "", ""),
    ("mass", "Mass", "Mass"),
    ("pulmonary mass", "Mass", "Mass"),
    ("breast mass", "", "Mass"),
    ("pleural mass", "", "Mass"),
    ("mediastinal mass", "", "Mass"),
    ("soft tissue mass", "", "Mass"),
    ("lung metastasis", "", ""),
    ("rib fracture", "Fracture", "Fracture"),
    ("callus rib fracture", "Fracture", "Fracture"),
    ("vertebral compression", "", ""),
    ("adenopathy", "", "Hilar Enlargement"),
    ("calcified mediastinal adenopathy", "", "Hilar Enlargement"),
    ("vascular hilar enlargement", "Hilar Enlargement", "Hilar Enlargement"),
    ("supra aortic elongation", "", "Aortic Elongation"),
    ("ascendent aortic elongation", "Aortic Elongation", "Aortic Elongation"),
    ("consolidation", "Consolidation|Infiltration", "Consolidation|Infiltration"),
    ("air bronchogram", "Consolidation|Infiltration", "Consolidation|Infiltration"),
    ("pacemaker", "Support Devices", "Support Devices"),
    ("dual chamber device", "Support Devices", "Support Devices"),
    ("endotracheal tube", "Support Devices", ""),
    ("central venous catheter via jugular vein", "Support Devices", ""),
    ("dai", "Support Devices", ""),
    ("sternotomy", "", ""),
    ("osteosynthesis material", "", ""),
    ("normal", "", ""),
    ("unchanged", "", ""),
)


def multi_hot(rows: list[list[str]]) -> np.ndarray:
    return np.array([[token in row for token in TOKENS] for row in rows], np.int8).reshape(len(rows), len(TOKENS))


def test_every_token_is_reviewed_with_a_reason() -> None:
    text = files("scaletransfer").joinpath("padchest_tokens.csv").read_text()
    header, *rows = csv.reader(text.splitlines())
    assert header == ["token", "finding", "reason"] and len(rows) == 193
    assert all(len(row) == 3 and len(row[2]) > 3 and row == [cell.strip() for cell in row] for row in rows)
    assert [row[0] for row in rows] == sorted({row[0] for row in rows})
    used = {finding for row in rows for finding in row[1].split("|")} - {""}
    assert used == set(FINDINGS)  # every finding has a token, and no other name is used


def test_the_published_facts() -> None:
    assert len(FINDINGS) == 27 and list(FINDINGS) == sorted(FINDINGS)
    assert set(EXTRA_TERMS) < set(FINDINGS) and sum(map(len, EXTRA_TERMS.values())) == 14
    assert all(term == term.lower() for terms in EXTRA_TERMS.values() for term in terms)
    assert len(EXCLUDED_IMAGE_IDS) == 30 and all(name.endswith(".png") for name in EXCLUDED_IMAGE_IDS)


@pytest.mark.parametrize(("token", "corrected", "paper"), DECIDED)
def test_decided_tokens(token: str, corrected: str, paper: str) -> None:
    assert findings_of(token, "corrected") == tuple(filter(None, corrected.split("|")))
    assert findings_of(token, "paper") == tuple(filter(None, paper.split("|")))


def test_vocabulary() -> None:
    assert vocabulary("padchest", "raw") == TOKENS
    for policy in ("paper", "corrected", LabelPolicy()):
        assert vocabulary("padchest", policy) == vocabulary("padchest", policy, TOKENS) == FINDINGS
    with pytest.raises(ValueError, match="did you mean 'Edema'"):
        vocabulary("padchest", LabelPolicy(per_label={"Edma": {}}))
    assert vocabulary("padchest", LabelPolicy(per_label={"Lung Opacity": {"blank": "zeros"}})) == FINDINGS


def test_rows_by_hand() -> None:
    rows = [[], ["normal"], ["hydropneumothorax", "pseudonodule"], ["pericardial effusion", "nodule", "NSG tube"]]
    shown = {
        "paper": [set(), set(), {"Pneumothorax", "Nodule"}, {"Effusion", "Nodule"}],
        "corrected": [set(), set(), {"Pneumothorax", "Effusion"}, {"Nodule", "Support Devices"}],
    }
    for policy, expected in shown.items():
        out = targets(multi_hot(rows), TOKENS, "padchest", policy)
        assert out.dtype == np.float32 and out.shape == (4, 27)
        assert [{FINDINGS[c] for c in np.flatnonzero(row)} for row in out] == expected
        assert set(np.unique(out)) == {0, 1}  # nothing is unknown


# The Labels text has blanks before tokens, empty tokens and repetitions; a token may stand in double quotes.
words = st.sampled_from((*TOKENS, "")).flatmap(lambda token: st.sampled_from((token, f" {token}")))


@given(st.lists(st.lists(words, max_size=8), max_size=5), st.permutations(range(193)))
def test_paper_is_the_substring_rule_on_the_text(rows: list[list[str]], order: list[int]) -> None:
    raw = multi_hot([[word.strip() for word in row] for row in rows])
    out = targets(raw[:, order], [TOKENS[at] for at in order], "padchest", "paper")
    for row, values in zip(rows, out, strict=True):
        text = str(row)
        for name, value in zip(FINDINGS, values, strict=True):
            assert value == any(term in text for term in (name.lower(), *EXTRA_TERMS.get(name, ())))


@given(st.lists(st.lists(st.sampled_from(TOKENS), max_size=6), max_size=5))
def test_a_row_has_the_findings_of_its_tokens_together(rows: list[list[str]]) -> None:
    out = targets(multi_hot(rows), TOKENS, "padchest", "corrected")
    for row, values in zip(rows, out, strict=True):
        assert {FINDINGS[at] for at in np.flatnonzero(values)} == {f for token in row for f in reviewed()[token]}


def test_wrong_labels_are_refused() -> None:
    raw = multi_hot([["nodule"]])
    with pytest.raises(ValueError, match=r"state -1; allowed are 1 \(listed\) and 0"):
        targets(-raw, TOKENS, "padchest")
    with pytest.raises(ValueError, match="state 2"):
        targets(2 * raw, TOKENS, "padchest")
    with pytest.raises(ValueError, match=r"the token 'noduel'.*did you mean 'nodule'"):
        targets(raw, ["noduel" if token == "nodule" else token for token in TOKENS], "padchest")
    with pytest.raises(ValueError, match="lack 'COPD signs'"):
        targets(raw[:, 1:], TOKENS[1:], "padchest")
    with pytest.raises(ValueError, match="name a token twice"):
        targets(np.hstack([raw, raw[:, :1]]), (*TOKENS, TOKENS[0]), "padchest")
    with pytest.raises(ValueError, match="shape"):
        targets(raw[:, 1:], TOKENS, "padchest")


def test_the_matrix_is_shared_and_cannot_be_changed() -> None:
    matrix = token_matrix(TOKENS, "corrected")
    assert matrix is token_matrix(TOKENS, "corrected")
    with pytest.raises(ValueError, match="read-only"):
        matrix[0, 0] = 2


def test_chunks_join_and_are_quick() -> None:
    raw = (np.random.default_rng(0).random((160_003, 193)) < 0.02).astype(np.int8)
    for policy in ("paper", "corrected"):
        start = time.process_time()
        out = targets(raw, TOKENS, "padchest", policy)
        assert time.process_time() - start < 2  # 0.03 s on one core
        rows = np.r_[0:3, 8190:8194, 160_000:160_003]
        np.testing.assert_array_equal(out[rows], targets(raw[rows], TOKENS, "padchest", policy))
