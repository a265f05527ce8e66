from __future__ import annotations

import numpy as np
import pytest

from scaletransfer.labels import CHEXPERT_COLUMNS
from scaletransfer.synthetic_findings import CHEXPERT_EFFECTS, Effect
from scaletransfer.synthetic_more_findings import MORE_EFFECTS
from scaletransfer.synthetic_render import render

EFFECTS = CHEXPERT_EFFECTS | MORE_EFFECTS


def draw(findings: dict[str, float], *, view: str = "PA", patient: int = 1, study: int = 1, image: int = 1,
         effects: dict[str, Effect] = EFFECTS) -> np.ndarray:  # fmt: skip
    return render(
        effects=effects,
        findings=findings,
        view=view,
        sex="Female",
        age=60,
        size=(96, 110),
        patient_seed=(patient,),
        study_seed=(patient, study),
        image_seed=(patient, study, image),
    ).astype(int)


@pytest.mark.parametrize(
    ("name", "view"),
    [(name, view) for name in CHEXPERT_EFFECTS for view in ("PA", "L")] + [(n, "PA") for n in MORE_EFFECTS],
)
def test_each_finding_changes_its_own_place(name: str, view: str) -> None:
    for patient in range(3):
        change = np.abs(draw({name: 0.9}, view=view, patient=patient) - draw({}, view=view, patient=patient))
        assert change.max() > 15, "too weak to see"
        assert (change > 8).mean() < 0.45, "everywhere"
    assert set(CHEXPERT_EFFECTS) == set(CHEXPERT_COLUMNS[1:])


def test_the_findings_of_the_second_task_are_others() -> None:
    """What one of them does to a picture is not what one of CheXpert's does, in place and shape."""

    def change(name: str, patient: int) -> np.ndarray:
        difference = draw({name: 0.9}, patient=patient) - draw({}, patient=patient)
        return np.ravel(difference / np.linalg.norm(difference))

    assert not set(MORE_EFFECTS) & set(CHEXPERT_EFFECTS)
    changes = {name: [change(name, patient) for patient in range(4)] for name in EFFECTS}
    for name in MORE_EFFECTS:
        for other in CHEXPERT_EFFECTS:
            alike = [float(a @ b) for a, b in zip(changes[name], changes[other], strict=True)]
            assert np.mean(alike) < 0.5, (name, other)


def test_strength_counts() -> None:
    plain = draw({})
    for name in EFFECTS:
        if name != "Support Devices":  # a tube is there or not
            weak, strong = (np.abs(draw({name: s}) - plain).sum() for s in (0.3, 1.0))
            assert strong > weak, name


def test_patients_differ_and_stay_themselves() -> None:
    assert (draw({}) == draw({})).all()

    def shape(picture: np.ndarray) -> np.ndarray:
        picture = picture - picture.mean()
        return picture / np.sqrt((picture**2).sum())

    same, other = [], []
    for patient in range(6):
        first = shape(draw({}, patient=patient))
        same.append((first * shape(draw({}, patient=patient, study=2, image=2))).sum())
        other.append((first * shape(draw({}, patient=patient + 1, study=2, image=2))).sum())
    assert np.mean(same) > np.mean(other)
    assert np.abs(draw({}) - draw({}, view="L")).mean() > 20


def test_another_task_is_another_table() -> None:
    def bright(canvas, rng, strength) -> None:
        canvas.density += strength * canvas.blob(0, 0, 0.1)

    effects = {"Spot": Effect(None, bright, bright)}
    change = draw({"Spot": 0.8}, effects=effects) - draw({}, effects=effects)
    assert change.max() > 15 and np.abs(change[:8]).max() == 0
