"""BiT-HyperRule against tables made by hand from the published rule."""

from __future__ import annotations

import pytest

from scaletransfer.transfer.hyperrule import hyper_rule, mixup_alpha, peak_lr, resolution

# training images, warm-up, decays, steps, mixup
TABLE = [
    (1, 100, (200, 300, 400), 500, 0.0),
    (10, 100, (200, 300, 400), 500, 0.0),
    (3_680, 100, (200, 300, 400), 500, 0.0),
    (19_999, 100, (200, 300, 400), 500, 0.0),
    (20_000, 500, (3000, 6000, 9000), 10_000, 0.1),
    (50_000, 500, (3000, 6000, 9000), 10_000, 0.1),
    (499_999, 500, (3000, 6000, 9000), 10_000, 0.1),
    (500_000, 500, (6000, 12000, 18000), 20_000, 0.1),
    (1_281_167, 500, (6000, 12000, 18000), 20_000, 0.1),
]

# protocol -> step -> share of the peak, in the 500-step schedule
RATES = {
    "bit": {0: 0.0, 1: 0.01, 50: 0.5, 99: 0.99, 100: 1, 199: 1, 200: 0.1, 299: 0.1, 300: 0.01, 400: 0.001, 499: 0.001},
    "paper": {
        0: 0.0,
        1: 0.01,
        50: 0.5,
        99: 0.99,
        100: 1,
        199: 1,
        200: 1,
        201: 0.1,
        300: 0.1,
        301: 0.01,
        400: 0.01,
        401: 0.001,
        499: 0.001,
    },
}


@pytest.mark.parametrize("protocol", ["bit", "paper"])
@pytest.mark.parametrize(("size", "warmup", "decays", "steps", "mixup"), TABLE)
def test_schedule_by_size(protocol, size, warmup, decays, steps, mixup):
    rule = hyper_rule(size, protocol)
    assert (rule.warmup, rule.decays, rule.steps, rule.mixup) == (warmup, decays, steps, mixup)
    assert mixup_alpha(size) == mixup


@pytest.mark.parametrize("protocol", ["bit", "paper"])
def test_rates_by_step(protocol):
    rule = hyper_rule(100, protocol)
    for step, share in RATES[protocol].items():
        assert rule.lr_at(step, 0.003) == pytest.approx(0.003 * share, rel=1e-12, abs=0)
    for outside in (-1, 500):
        with pytest.raises(ValueError, match="0 to 499"):
            rule.lr_at(outside, 0.003)


@pytest.mark.parametrize("protocol", ["bit", "paper"])
def test_every_rate_as_the_released_loop_computes_it(protocol):
    """The rule as it is written down in words: rise to the first edge, a tenth after every further edge."""
    for size in (100, 50_000, 2_000_000):
        rule = hyper_rule(size, protocol)
        for step in range(0, rule.steps, 7):
            expected = 0.003
            if step < rule.warmup:
                expected = 0.003 * step / rule.warmup
            else:
                for edge in rule.decays:
                    if (edge < step) if protocol == "paper" else (edge <= step):
                        expected /= 10
            assert rule.lr_at(step, 0.003) == pytest.approx(expected, rel=1e-12)


def test_another_length_keeps_the_shape():
    rule = hyper_rule(100, "bit", steps=50)
    assert (rule.warmup, rule.decays, rule.steps) == (10, (20, 30, 40), 50)
    assert hyper_rule(100, "bit", steps=500) == hyper_rule(100, "bit")
    assert hyper_rule(30_000, "bit", steps=1_000).decays == (300, 600, 900)
    one = hyper_rule(5, "bit", steps=1)
    assert one.lr_at(0, 0.5) > 0  # a warm-up that rounds to nothing must not leave a run of zeros


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (32, 32, (160, 128)),
        (95, 96, (160, 128)),
        (96, 96, (512, 480)),
        (72, 128, (512, 480)),
        (64, 143, (160, 128)),
        (64, 144, (512, 480)),
        (500, 375, (512, 480)),
        (2320, 2828, (512, 480)),
    ],
)
def test_resolution(height, width, expected):
    assert resolution(height, width) == expected


def test_peak_rates():
    assert peak_lr(512, "bit") == pytest.approx(0.003)
    assert peak_lr(128, "bit") == pytest.approx(0.00075)
    assert peak_lr(128, "paper") == pytest.approx(0.001)
    assert peak_lr(256, "paper") == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, "bit"), "empty"), ((10, "big"), "bit, paper"), ((10, "bit", 0), "1 or more")],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        hyper_rule(*arguments)
