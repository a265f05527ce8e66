"""Tables of results: the published form with its duplicated rows, means over seeds, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_report import write_run, write_table

from scaletransfer.report_curves import curves_of
from scaletransfer.report_inputs import read_inputs
from scaletransfer.result_names import (
    canonical_metric,
    lower_is_better,
    network_name,
    network_order,
    parse_shot,
    split_model,
)
from scaletransfer.result_rows import Entry
from scaletransfer.result_table import PACKAGED, read_table, write_scores

FOUR = "chexpert_mimic_nih_padchest_bit152x4"


def entry(entries: list[Entry], **wanted: object) -> Entry:
    (found,) = [e for e in entries if all(getattr(e, name) == value for name, value in wanted.items())]
    return found


def test_the_released_form_gives_the_published_mean(tmp_path: Path) -> None:
    # hits of 121 test images that have the published mean, standard deviation, minimum and maximum; float32 as released
    hits = [109, 109, 110, 111, 111]
    rows = [
        (float(np.float32(n / 121)), "test/acc", s, "full_shot", FOUR, "tuberculosis_full") for s, n in enumerate(hits)
    ]
    table = write_table(tmp_path / "finetuning_results_tuberculosis_full_test_acc.csv", rows, times=2)
    inputs = read_inputs([table])
    (ours,) = inputs.entries
    paper = entry(
        read_inputs([PACKAGED]).entries,
        dataset="tuberculosis_full",
        metric="accuracy",
        pretraining="chexpert_mimic_nih_padchest",
        network="bit152x4",
        shot=None,
    )
    assert ours.key == paper.key and ours.main and not inputs.notes
    mine, theirs = ours.estimate, paper.estimate
    assert mine.interval is not None and theirs.interval is not None
    assert (len(mine.seeds), theirs.seeds, mine.kind, theirs.kind) == (5, (0, 1, 2, 3, 4), "seeds", "seeds")
    np.testing.assert_allclose(
        [mine.mean, mine.std, mine.least, mine.most, *mine.interval],
        [theirs.mean, theirs.std, theirs.least, theirs.most, *theirs.interval],
        atol=1e-4,
    )


def test_released_values_of_four_seeds_give_the_published_mean(tmp_path: Path) -> None:
    # finetuning_results_pets_test_acc.csv of the released results has these for imagenet1k_bit50x1, full_shot
    released = {1: 0.8579994440078735, 2: 0.8509130477905273, 0: 0.8550013899803162, 3: 0.84464430809021}
    rows = [(value, "test/acc", seed, "full_shot", "imagenet1k_bit50x1", "pets") for seed, value in released.items()]
    (ours,) = read_inputs([write_table(tmp_path / "t.csv", rows, times=2)]).entries
    names = {"dataset": "pets", "metric": "accuracy", "pretraining": "imagenet1k", "network": "bit50x1", "shot": None}
    paper = entry(read_inputs(["paper"]).entries, **names)
    assert (len(ours.estimate.seeds), paper.estimate.seeds) == (4, (0, 1, 2, 3))
    assert ours.estimate.mean == pytest.approx(paper.estimate.mean, abs=1e-4)
    assert ours.estimate.std == pytest.approx(paper.estimate.std, abs=1e-4)


def test_percent_and_shares_are_told_apart_and_what_is_unusual_is_said(tmp_path: Path) -> None:
    def value(metric: str, *numbers: float) -> tuple[list[float], list[str]]:
        rows = [(number, metric, seed, "5_shot", "a", "d") for seed, number in enumerate(numbers)]
        scores, _, notes = read_table(write_table(tmp_path / "t.csv", rows))
        return [score.value for score in scores], notes

    assert value("test/acc", 0.5, 1.0) == ([50.0, 100.0], [])
    assert value("test_acc", 50.0, 0.0, 61.5) == ([50.0, 0.0, 61.5], [])
    shares, notes = value("test_acc", 0.5, 0.25)
    assert shares == [50.0, 25.0] and "test_acc is read as shares of one" in notes[0]
    percent, notes = value("test/acc", 50.0, 25.0)
    assert percent == [50.0, 25.0] and "test/acc is read as percent" in notes[0]
    assert value("test/loss", 2.5, 0.5) == ([2.5, 0.5], [])
    for numbers, line in (((0.5, 0.6, 12.0), 4), ((0.5, -0.1), 3), ((150.0, 20.0), 2)):
        with pytest.raises(ValueError, match=f"line {line}, column metric_value"):
            value("test/acc", *numbers)


def test_a_run_that_was_resumed_counts_once_with_its_last_row(tmp_path: Path) -> None:
    rows = [
        (0.1, "test/acc", 0, "1_shot", FOUR, "covidx_cxr2", 400),
        (0.3, "test/acc", 0, "1_shot", FOUR, "covidx_cxr2"),
    ]
    rows += [(0.2, "test/acc", 0, "1_shot", FOUR, "covidx_cxr2", 400)]
    inputs = read_inputs([write_table(tmp_path / "t.csv", rows)])
    (one,) = inputs.entries
    assert one.values == pytest.approx({0: 30.0}) and one.last_steps == (500,)
    first = f"({tmp_path / 't.csv'}, line 3 is the first)"
    assert inputs.notes == [
        f"2 rows had another value for a run that is there already {first}: of each run the row with the most steps "
        "counts, the last of these"
    ]
    text = (tmp_path / "t.csv").read_text().replace("finetuning_results", "other", 1)
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(
        ValueError, match=r"line 2 and .*line 3 both are chexpert_mimic_nih_padchest bit152x4 on covidx"
    ):
        read_inputs([tmp_path / "t.csv"])


def test_comments_byte_order_marks_quotes_and_line_ends(tmp_path: Path) -> None:
    head = "dataset,metric,metric_value,path,seed,shot,pretrained_model,last_step,more\r\n"
    path = tmp_path / "t.csv"
    path.write_bytes(("\ufeff# made by hand\r\n" + head + '"a, ""b""\nc",test/acc,.5,,1,full,m,5,x\r\n\r\n').encode())
    (score,) = read_table(path)[0]
    assert (score.dataset, score.value, score.shot, score.where) == ('a, "b"\nc', 50.0, None, f"{path}, line 3")


HEAD = b"metric_value,metric,path,seed,shot,pretrained_model,dataset,last_step\n"
MEANS = b"dataset,metric,primary,model,pretraining,shot,n_seeds,mean,std_ddof1,seeds\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: give a table with the columns metric_value"),
        (b"a,b\n1,2\n", "line 1, column metric_value: the header lacks metric_value, metric, path"),
        (HEAD.replace(b"seed,", b""), "line 1, column seed: the header lacks seed; a table of results of runs"),
        (MEANS.replace(b"std_ddof1,", b""), "line 1, column std_ddof1: the header lacks std_ddof1; a table of means"),
        (HEAD.replace(b"path", b"seed"), "line 1, column seed: the header has this column twice"),
        (HEAD + b"0.5,test/acc,p,0,5_shot,m,d\n", "line 2, column last_step: there are 7 cells, the header has 8"),
        (HEAD + b"0.5,test/acc,p,0,5_shot,m,d,5,6\n", "line 2, column last_step: there are 9 cells"),
        (
            HEAD + b"\n#x\nhalf,test/acc,p,0,5_shot,m,d,5\n",
            "line 4, column metric_value: 'half' is not a finite number",
        ),
        (HEAD + b"nan,test/acc,p,0,5_shot,m,d,5\n", "line 2, column metric_value: 'nan' is not a finite number"),
        (HEAD + b",test/acc,p,0,5_shot,m,d,5\n", "line 2, column metric_value: there is nothing"),
        (HEAD + b"0.5,test/acc,p,-1,5_shot,m,d,5\n", "line 2, column seed: '-1' is not a whole number of at least 0"),
        (HEAD + b"0.5,test/acc,p,0.5,5_shot,m,d,5\n", "line 2, column seed: '0.5' is not a whole number"),
        (HEAD + b"0.5,test/acc,p,0,few,m,d,5\n", "line 2, column shot: 'few' is neither a number of images per class"),
        (HEAD + b"0.5,test/acc,p,0,0_shot,m,d,5\n", "line 2, column shot: '0_shot' is neither"),
        (HEAD + b'"0.5,test/acc,p,0,5_shot,m,d,5\n', "line 2: this is no CSV"),
        (HEAD + b"0.5,test/acc,\xff,0,5_shot,m,d,5\n", "line 2: this is not UTF-8"),
        (MEANS + b"d,test_acc,True,n,p,5_shot,0,50,1,0\n", "line 2, column n_seeds: '0' is not a whole number"),
        (MEANS + b"d,test_acc,True,n,p,5_shot,2,50,-1,0 1\n", "line 2, column std_ddof1: -1 is below 0"),
        (MEANS + b"d,test_acc,True,n,p,5_shot,3,50,1,0 1\n", "line 2, column seeds: there are 2, but n_seeds is 3"),
        (MEANS + b"d,test_acc,True,n,p,5_shot,2,150,1,0 1\n", "line 2, column mean: 150 is no percentage"),
        (MEANS + b"d,test_acc,yes,n,p,5_shot,2,50,1,0 1\n", "line 2, column primary: 'yes' is neither"),
        (HEAD, "holds no result"),
    ],
)
def test_bad_tables_are_refused_with_file_line_and_column(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_inputs([path])
    assert str(caught.value).startswith(str(path)) and message in str(caught.value) and "\n" not in str(caught.value)


def test_means_that_look_like_shares_are_told(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(MEANS + b"d,test_acc,True,n,p,5_shot,2,.5,.1,0 1\n")
    assert "means are percent, and none of accuracy is above 1" in read_inputs([path]).notes[0]


def test_a_path_that_no_file_system_takes_is_no_folder(tmp_path: Path) -> None:
    rows = [(0.5, "test/acc", 0, "5_shot", "m" * 300, "d")]
    (one,) = read_inputs([write_table(tmp_path / "t.csv", rows)]).entries
    assert curves_of([one]) == [] and one.pretraining == "m" * 300


def test_rows_know_what_their_run_folders_know(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    bounds = {"accuracy": 0.5, "mean_auroc": 0.75, "mean_classes": 2, "intervals": {"accuracy": [0.4, 0.61]}}
    run = write_run(sweep / "runs" / "x", 0.5, pretrained_model="net", metrics=bounds)
    (run / "model").mkdir()
    (run / "model" / "model.json").write_text('{"model": "BiT-S-R50x1"}')
    lines = ["metric_value,metric,path,seed,shot,pretrained_model,dataset,last_step"]
    lines += ["50.0,test_acc,elsewhere/sweep/runs/x,0,5_shot,named,xray5,500"]  # the folder has moved
    (sweep / "results.csv").write_text("\n".join(lines) + "\n")
    (one,) = read_inputs([sweep]).entries  # once, although table and folder both have it
    assert (one.pretraining, one.network, one.main) == ("named", "bit50x1", True)
    assert (one.estimate.interval, one.estimate.kind, one.paths) == ((40.0, 61.0), "bootstrap", (str(run),))
    (sweep / "results.csv").write_text("\n".join(lines).replace("50.0", "51.0") + "\n")
    with pytest.raises(ValueError, match=r"line 2, column metric_value: 51 % in accuracy, but .*result.json says 50 %"):
        read_inputs([sweep])
    (sweep / "results.csv").write_text("\n".join(lines).replace("5_shot", "1_shot") + "\n")
    with pytest.raises(ValueError, match=r"line 2, column shot: the run in .* has another shot"):
        read_inputs([sweep])


def test_rows_of_networks_of_every_name_are_read_again(tmp_path: Path) -> None:
    for number, network in enumerate(("BiT-S-R50x1", "BiT-tiny", "resnet50")):
        (write_run(tmp_path / "runs" / f"{number}", 0.5) / "model").mkdir()
        (tmp_path / "runs" / f"{number}" / "model" / "model.json").write_text(f'{{"model": "{network}"}}')
    first = read_inputs([tmp_path / "runs"])
    write_scores(first.scores, tmp_path / "t.csv")
    assert {e.key: e.values for e in read_inputs([tmp_path / "t.csv"]).entries} == {
        e.key: e.values for e in first.entries
    }
    assert {(e.pretraining, e.network) for e in first.entries} == {
        ("scratch", "bit50x1"),
        ("scratch", "BiT-tiny"),
        ("scratch", "resnet50"),
    }


def test_a_sweep_that_lists_some_of_its_runs_is_read_whole(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", 0.5)
    write_run(tmp_path / "runs" / "b", 0.6, seed=1)
    write_table(tmp_path / "results.csv", [(60.0, "test_acc", 1, "5_shot", "scratch", "xray5")])
    text = (tmp_path / "results.csv").read_text().replace("finetuning_results/xray5/scratch/5_shot/seed_1", "runs/b")
    (tmp_path / "results.csv").write_text(text)
    found = entry(read_inputs([tmp_path]).entries, metric="accuracy")
    assert found.values == pytest.approx({0: 50.0, 1: 60.0})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    rows = [(0.1234567, "test/acc", s, shot, FOUR, "pets") for s in range(2) for shot in ("5_shot", "full_shot")]
    rows += [(1.25, "test/loss", 0, "5_shot", "scratch", "pets")]
    first = read_inputs([write_table(tmp_path / "a.csv", rows, times=2)])
    write_scores(first.scores, tmp_path / "b.csv")
    second = read_inputs([tmp_path / "b.csv"])
    assert [(e.key, e.values) for e in second.entries] == [(e.key, pytest.approx(e.values)) for e in first.entries]
    assert (tmp_path / "b.csv").read_text().count("\n") == 1 + 5


def test_the_main_metric_is_accuracy_but_for_padchest(tmp_path: Path) -> None:
    rows = [
        (0.5, f"test/{m}", 0, "5_shot", "a", d)
        for d in ("pets", "padchest", "padchest_cl")
        for m in ("mean_auc", "acc", "f1_0")
    ]
    rows += [(0.5, "test/recall_0", 0, "5_shot", "a", "odd")]
    entries = read_inputs([write_table(tmp_path / "a.csv", rows)]).entries
    assert {(e.dataset, e.metric) for e in entries if e.main} == {
        ("pets", "accuracy"),
        ("padchest", "mean_auroc"),
        ("padchest_cl", "mean_auroc"),
        ("odd", "recall_0"),
    }


def test_names() -> None:
    assert [split_model(n) for n in (FOUR, "imagenet1k_bit50x1_optimized", "BiT-M-R50x1", "scratch", "bit50x1")] == [
        ("chexpert_mimic_nih_padchest", "bit152x4"),
        ("imagenet1k_optimized", "bit50x1"),
        ("BiT-M", "bit50x1"),
        ("scratch", ""),
        ("bit50x1", ""),
    ]
    assert [network_name(n) for n in ("BiT-S-R152x4", "R50x1", "BiT-tiny", "resnet50", "")] == [
        "bit152x4",
        "bit50x1",
        "BiT-tiny",
        "resnet50",
        "",
    ]
    assert sorted(["bit152x4", "bit50x3", "bit101x1", "bit50x1"], key=network_order) == [
        "bit50x1",
        "bit101x1",
        "bit50x3",
        "bit152x4",
    ]
    assert [canonical_metric(n) for n in ("test/acc", "test_mean_auc", "accuracy", "test/AUC_class_3")] == [
        "accuracy",
        "mean_auroc",
        "accuracy",
        "auroc_class_3",
    ]
    assert [parse_shot(n) for n in ("5_shot", "10", "full_shot", "all")] == [5, 10, None, None]
    assert lower_is_better("loss") and lower_is_better("ece") and not lower_is_better("mean_precision")
