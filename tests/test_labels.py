from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from scaletransfer.labels import (
    CHEXPERT_COLUMNS,
    CHEXPERT_FINDINGS,
    CHEXPERT_RAW,
    NEGATIVE,
    NOT_MENTIONED,
    POSITIVE,
    UNCERTAIN,
    LabelPolicy,
    combine,
    project,
    targets,
    vocabulary,
)

NF, SD, EDEMA = (CHEXPERT_RAW.index(name) for name in ("No Finding", "Support Devices", "Edema"))
NIH = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia"),
    *("Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax"),
)
states = arrays(np.int8, st.tuples(st.integers(0, 6), st.just(14)), elements=st.integers(-2, 1))


def plain(raw: np.ndarray, policy: LabelPolicy) -> np.ndarray:
    """The rules cell by cell, as PROTOCOL words them: No Finding first, then uncertain and blank."""
    rows = []
    for row in raw.tolist():
        out = []
        for name, state in zip(CHEXPERT_RAW, row, strict=True):
            if name == "No Finding":
                continue
            if row[NF] == 1 and (policy.name == "paper" or name != "Support Devices"):
                state = 0
            rules = {"uncertain": policy.uncertain, "blank": policy.blank} | dict(policy.per_label.get(name, {}))
            kind = {-1: "uncertain", -2: "blank"}.get(state)
            out.append(state if kind is None else {"ignore": np.nan, "ones": 1, "zeros": 0}[rules[kind]])
        rows.append(out)
    return np.array(rows, np.float32).reshape(len(rows), 13)


def test_names_and_their_order() -> None:
    assert len(CHEXPERT_COLUMNS) == 14 and CHEXPERT_COLUMNS[0] == "No Finding"
    assert (
        *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture"),
        *("Lung Lesion", "Lung Opacity", "No Finding", "Effusion", "Pleural Other", "Pneumonia"),
        *("Pneumothorax", "Support Devices"),
    ) == CHEXPERT_RAW
    assert tuple(name for name in CHEXPERT_RAW if name != "No Finding") == CHEXPERT_FINDINGS
    assert vocabulary("chexpert", "raw") == CHEXPERT_RAW
    assert vocabulary("mimic", "paper") == vocabulary("chexpert", LabelPolicy()) == CHEXPERT_FINDINGS
    assert vocabulary("clinic", "corrected", ("A", "No Finding", "B")) == ("A", "B")


@pytest.mark.parametrize("name, devices", [("paper", 0.0), ("corrected", 1.0)])
def test_no_finding_and_support_devices(name: str, devices: float) -> None:
    raw = np.full((1, 14), NOT_MENTIONED, np.int8)
    raw[0, [NF, SD]], raw[0, EDEMA] = POSITIVE, UNCERTAIN
    (out,) = targets(raw, CHEXPERT_RAW, "chexpert", name)
    assert out[-1] == devices and (out[:-1] == 0).all() and out.dtype == np.float32
    raw[0, NF] = UNCERTAIN  # only 1 counts
    (out,) = targets(raw, CHEXPERT_RAW, "chexpert", name)
    assert out[-1] == 1 and np.isnan(out[:-1]).all()


@given(
    states,
    st.sampled_from(["paper", "corrected"]),
    st.sampled_from(["ignore", "ones", "zeros"]),
    st.sampled_from(["ignore", "zeros"]),
    st.dictionaries(
        st.sampled_from(CHEXPERT_FINDINGS),
        st.fixed_dictionaries({}, optional={"uncertain": st.sampled_from(["ignore", "ones", "zeros"])}),
        max_size=3,
    ),
)
def test_every_cell_follows_the_rules(raw, name, uncertain, blank, per_label) -> None:
    policy = LabelPolicy(name=name, uncertain=uncertain, blank=blank, per_label=per_label)
    np.testing.assert_array_equal(targets(raw, CHEXPERT_RAW, "chexpert", policy), plain(raw, policy))


@given(states, st.permutations(range(14)))
def test_columns_are_found_by_name(raw, order) -> None:
    shuffled = targets(raw[:, order], [CHEXPERT_RAW[i] for i in order], "chexpert")
    np.testing.assert_array_equal(shuffled, targets(raw, CHEXPERT_RAW, "chexpert"))


def test_chunks_join_and_are_quick() -> None:
    raw = np.random.default_rng(0).integers(-2, 2, (200_003, 14), dtype=np.int8)
    start = time.process_time()
    out = targets(raw, CHEXPERT_RAW, "chexpert", "paper")
    assert time.process_time() - start < 2  # 0.05 s on one core; a loop over rows takes minutes
    rows = np.r_[0:3, 65534:65539, 199_999:200_003]
    np.testing.assert_array_equal(out[rows], plain(raw[rows], LabelPolicy(name="paper")))


def test_wrong_labels_are_refused() -> None:
    raw = np.zeros((2, 14), np.int8)
    with pytest.raises(ValueError, match="'Edema'"):  # the published code repeated the column before
        targets(raw[:, 1:], [n for n in CHEXPERT_RAW if n != "Edema"], "chexpert")
    with pytest.raises(ValueError, match="'No Finding'"):
        targets(raw[:, 1:], CHEXPERT_FINDINGS, "chexpert")
    for value in (2, -3):
        with pytest.raises(ValueError, match=f"state {value}"):
            targets(np.full((1, 14), value, np.int8), CHEXPERT_RAW, "chexpert")
    with pytest.raises(ValueError, match="shape"):
        targets(raw.astype(np.float32), CHEXPERT_RAW, "chexpert")
    with pytest.raises(ValueError, match="did you mean 'chexpert'"):
        vocabulary("chexprt", "paper")


def test_wrong_policies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels.name is 'papr'.*did you mean 'paper'"):
        LabelPolicy(name="papr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels\.blank is 'ones'"):
        LabelPolicy(blank="ones")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels\.per_label\.Edema has no option 'uncertan'"):
        LabelPolicy(per_label={"Edema": {"uncertan": "ones"}})
    with pytest.raises(ValueError, match="must be a mapping"):
        LabelPolicy(per_label={"Edema": "ones"})  # type: ignore[dict-item]
    policy = LabelPolicy(per_label={"Oedema": {"blank": "zeros"}})
    with pytest.raises(ValueError, match="did you mean 'Edema'"):
        targets(np.zeros((1, 14), np.int8), CHEXPERT_RAW, "chexpert", policy)


def test_nih_knows_its_names() -> None:
    assert vocabulary("nih", "raw") == tuple(sorted((*NIH, "No Finding")))
    assert vocabulary("nih", "paper") == vocabulary("nih", "corrected") == NIH
    names = (*NIH, "No Finding")  # as a source may have them, in another order
    raw = np.zeros((3, 15), np.int8)
    raw[0, -1] = raw[1, names.index("Hernia")] = 1
    for policy in ("paper", "corrected"):
        out = targets(raw, names, "nih", policy)
        assert out.shape == (3, 14) and np.argwhere(out).tolist() == [[1, NIH.index("Hernia")]]
    with pytest.raises(ValueError, match="'No Finding'"):
        targets(raw[:, :-1], NIH, "nih")


SEVEN = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Pneumonia", "Pneumothorax")
UNION_OF_THREE = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema"),
    *("Enlarged Cardiomediastinum", "Fibrosis", "Fracture", "Hernia", "Infiltration", "Lung Lesion", "Lung Opacity"),
    *("Mass", "Nodule", "Pleural Other", "Pleural_Thickening", "Pneumonia", "Pneumothorax", "Support Devices"),
)
UNION_OF_FOUR = (
    *("Air Trapping", "Aortic Atheromatosis", "Aortic Elongation", "Atelectasis", "Bronchiectasis", "Cardiomegaly"),
    *("Consolidation", "Costophrenic Angle Blunting", "Edema", "Effusion", "Emphysema"),
    *("Enlarged Cardiomediastinum", "Fibrosis", "Flattened Diaphragm", "Fracture", "Granuloma"),
    *("Hemidiaphragm Elevation", "Hernia", "Hilar Enlargement", "Infiltration", "Lung Lesion", "Lung Opacity", "Mass"),
    *("Nodule", "Pleural Other", "Pleural_Thickening", "Pneumonia", "Pneumothorax", "Scoliosis", "Support Devices"),
    "Tuberculosis",
)


@pytest.mark.parametrize(
    ("sources", "intersection", "union"),
    [
        (("chexpert", "mimic"), CHEXPERT_FINDINGS, CHEXPERT_FINDINGS),
        (("chexpert", "mimic", "nih"), SEVEN, UNION_OF_THREE),
        (("chexpert", "mimic", "nih", "padchest"), SEVEN, UNION_OF_FOUR),
    ],
)
@pytest.mark.parametrize("policy", ["paper", "corrected"])
def test_the_merges_of_the_paper(sources, intersection, union, policy) -> None:
    tables = [vocabulary(source, policy) for source in sources]
    assert combine(tables, "intersection") == intersection
    assert combine(tables, "union") == union


@pytest.mark.parametrize("sources", [("chexpert", "nih"), ("chexpert", "mimic", "padchest"), ("nih", "padchest")])
def test_a_union_masks_what_a_source_does_not_know(sources) -> None:
    """One image of each source, with an effusion and nothing else said: every cell of the union is what that source
    knows, or unknown."""
    names = combine([vocabulary(source, "corrected") for source in sources], "union")
    for source in sources:
        raw_names = vocabulary(source, "raw")
        token = "pleural effusion" if source == "padchest" else "Effusion"
        raw = np.full((1, len(raw_names)), NEGATIVE, np.int8)
        raw[0, raw_names.index(token)] = POSITIVE
        own = vocabulary(source, "corrected")
        (row,) = project(targets(raw, raw_names, source, "corrected"), own, names)
        for name, value in zip(names, row, strict=True):
            if name in own:
                assert value == (name == "Effusion"), name
            else:
                assert np.isnan(value), name


def test_combining_vocabularies() -> None:
    assert combine([CHEXPERT_FINDINGS, CHEXPERT_FINDINGS, NIH], "intersection") == SEVEN
    assert combine([CHEXPERT_FINDINGS, CHEXPERT_FINDINGS], "union") == CHEXPERT_FINDINGS
    assert combine([NIH], "intersection") == NIH
    # Both from CheXpert's family: Effusion keeps the place of Pleural Effusion.
    part = tuple(n for n in CHEXPERT_FINDINGS if n != "Edema")
    assert combine([part, CHEXPERT_FINDINGS], "union") == CHEXPERT_FINDINGS
    both = combine([CHEXPERT_FINDINGS, NIH], "union")
    assert set(both) == {*CHEXPERT_FINDINGS, *NIH} and list(both) == sorted(both)
    for bad, words in (([], "no vocabulary"), ([("A", "A")], "twice"), ([("A",), ("B",)], "union")):
        with pytest.raises(ValueError, match=words):
            combine(bad, "intersection")
    with pytest.raises(ValueError, match="did you mean 'union'"):
        combine([NIH], "unoin")


@given(st.lists(st.sets(st.sampled_from("abcdefg"), min_size=1).map(lambda s: tuple(sorted(s))), min_size=1))
def test_combination_does_not_depend_on_the_order_of_sources(tables) -> None:
    results = {combine(order, "union") for order in itertools.islice(itertools.permutations(tables), 12)}
    assert len(results) == 1


@settings(deadline=None)
@given(states)
def test_projection_keeps_values_and_masks_the_rest(raw) -> None:
    values = targets(raw, CHEXPERT_RAW, "chexpert", LabelPolicy(blank="zeros", uncertain="ones"))
    onto = combine([CHEXPERT_FINDINGS, NIH], "union")
    out = project(values, CHEXPERT_FINDINGS, onto)
    assert out.shape == (len(raw), len(onto)) and out.dtype == np.float32
    for column, name in enumerate(onto):
        if name in CHEXPERT_FINDINGS:
            np.testing.assert_array_equal(out[:, column], values[:, CHEXPERT_FINDINGS.index(name)])
        else:
            assert np.isnan(out[:, column]).all()
    np.testing.assert_array_equal(project(out, onto, CHEXPERT_FINDINGS), values)
    assert NEGATIVE == 0
    with pytest.raises(ValueError, match="shape"):
        project(values, onto, onto)
