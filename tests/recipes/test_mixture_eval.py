"""The recipe that measures finished runs, on tiny ones."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from group import free_ports
from running import ROOT, SUITES, exit_status, finished, load_recipe
from standins import write_natural_instructions, write_tokenizer
from tiers import slow_but

from adapt_recipes.config import load
from adapt_recipes.data import ByteTokenizer, ChatTokenizer
from adapt_recipes.evaluation import records
from adapt_recipes.evaluation.records import read_evaluation, read_samples
from adapt_recipes.evaluation.subjects import own_tasks, subjects_of
from adapt_recipes.run_directory import EVALUATION
from adapt_recipes.shipped import shipped

sys.path += [str(ROOT / "tests" / folder) for folder in ("evaluation", "models")]

from lm_tasks import manager, write_model, write_rows  # noqa: E402
from parity import CASES, transformers_model  # noqa: E402

mixture_eval = load_recipe("mixture_eval")
TYPES = ("Question Answering", "Sentiment Analysis", "Summarization", "Dialogue Generation")
TRAINED = list(TYPES[:3])
SHORT = ["device=cpu", "dtype=fp32", "max_answer_tokens=4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/a and runs/b, of two seeds, on three of four task types; models/base, from which they started."""
    home = tmp_path_factory.mktemp("home")
    base = write_model(home / "models" / "base")
    write_natural_instructions(home / "data", TYPES, num_examples=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        for seed, run in enumerate("ab"):
            finished(
                "smollm2_135m_uniform_10pct",
                *(f"{key}.path={base}" for key in ("model", "tokenizer")),
                f"checkpointer.checkpoint_dir={base}",
                "tasks.path=data",
                f"tasks.types={TRAINED}".replace("'", ""),
                f"seed={seed}",
                *("device=cpu", "dtype=fp32", "max_seq_len=256", "batch_size=8", "budget.tokens=120"),
                *("tasks.validation_examples=5", "tasks.test_examples=4"),
                output_dir=home / "runs" / run,
            )
    return home


@pytest.fixture
def there(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``home`` is the current folder."""
    shutil.copytree(home, tmp_path / "home", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(mixture_eval.Recipe, "lm_tasks", property(lambda self: manager()))
    return tmp_path / "home"


def evaluate(suite: str, *overrides: str) -> int:
    return mixture_eval.main(load(mixture_eval.Config, SUITES[suite], [*SHORT, *overrides]))


def measured(folder: str, suite: str) -> dict[str, Any]:
    """The scores without their times."""
    found = read_evaluation(Path(folder))
    assert found is not None
    return {task: {**vars(score), "seconds": 0} for task, score in found.suites[suite].scores.items()}


def test_own_tasks(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """lm-eval measures the model in ``model/`` as the run itself did: the same likelihoods of the same test split."""
    base = ["model=models/base", "output_dir=runs/base"]
    assert evaluate("eval_tasks", "runs=[runs/a,runs/b]", *base) == 0
    out = capsys.readouterr().out
    assert "mean of own tasks" in out and "runs/base" in out
    for subject in subjects_of(["runs/a", "runs/b"], "models/base", "runs/base"):
        scores = records.scores_of(subject.folder, "eval_tasks")
        assert [*scores] == TRAINED
        splits = own_tasks(subject, ChatTokenizer(subject.tokenizer)).splits
        of_tasks = {split.task: split.examples for split in splits}
        for task, score in scores.items():
            assert score.data == "test" and score.num_examples == 4 and score.left_out == {}
            assert 0 <= score.values["exact_match"] <= score.values["rouge_l"] <= 1 or score.values["exact_match"] == 0
            samples = read_samples(subject.folder, "eval_tasks", task)
            nats = math.fsum(s.values["bits_per_byte"] * len(s.references[0].encode()) for s in samples) * math.log(2)
            loss = nats / int(of_tasks[task].num_supervised.sum())
            if subject.run == subject.folder:
                summary = json.loads((subject.folder / "summary.json").read_text())
                assert loss == pytest.approx(summary["test_losses"][task], abs=1e-5)
            # Answers are cut, and those that were are counted.
            assert score.values["answer_tokens"] <= 4
            assert score.values["unstopped"] == sum(s.values["answer_tokens"] >= 4 for s in samples) / 4
    assert measured("runs/base", "eval_tasks") != measured("runs/a", "eval_tasks") != measured("runs/b", "eval_tasks")


def test_what_is_there_is_not_measured_again(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate("eval_tasks", "runs=[runs/a]", "only=[Summarization]") == 0
    first = (there / "runs/a" / EVALUATION).read_text()
    assert evaluate("eval_tasks", "runs=[runs/a]") == 0
    assert [*measured("runs/a", "eval_tasks")] == ["Summarization", *TRAINED[:2]]
    monkeypatch.setattr(mixture_eval, "open_model", lambda *_, **__: pytest.fail("nothing is missing"))
    before = (there / "runs/a" / EVALUATION).read_text()
    assert evaluate("eval_tasks", "runs=[runs/a]") == 0
    assert (there / "runs/a" / EVALUATION).read_text() == before != first


def test_an_interrupted_evaluation_goes_on(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate("eval_tasks", "runs=[runs/a]") == 0
    whole = measured("runs/a", "eval_tasks")
    (there / "runs/a" / EVALUATION).unlink()
    ask = mixture_eval.ask

    def stop_at_second(*arguments: Any, **options: Any) -> Any:
        if measured_tasks := records.scores_of(Path("runs/a"), "eval_tasks"):
            assert len(measured_tasks) == 1
            raise KeyboardInterrupt
        return ask(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mixture_eval, "ask", stop_at_second)
        evaluate("eval_tasks", "runs=[runs/a]")
    assert evaluate("eval_tasks", "runs=[runs/a]") == 0
    assert measured("runs/a", "eval_tasks") == whole


@pytest.mark.slow
def test_several_processes_share_the_tasks(there: Path) -> None:
    assert evaluate("eval_tasks", "runs=[runs/a,runs/b]") == 0
    alone = {run: measured(f"runs/{run}", "eval_tasks") for run in "ab"}
    write_rows(there / "rows", ["boolq.jsonl"])
    for run in "ab":
        (there / "runs" / run / EVALUATION).unlink()
    (port,) = free_ports(1)
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"PYTHONPATH": str(ROOT), "LOCAL_WORLD_SIZE": "2"}

    def processes(suite: str, *overrides: str) -> list[tuple[int, str]]:
        command = [sys.executable, str(ROOT / "recipes" / "mixture_eval.py"), "--config", str(SUITES[suite]), *SHORT]
        started = [
            subprocess.Popen(
                [*command, "runs=[runs/a,runs/b]", *overrides],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=240)[0] for process in started]
        return [(process.returncode, out) for process, out in zip(started, outputs, strict=True)]

    ended = processes("eval_tasks")
    assert [status for status, _ in ended] == [0, 0]
    assert {run: measured(f"runs/{run}", "eval_tasks") for run in "ab"} == alone
    lines = [line for _, out in ended for line in out.splitlines() if line.startswith("runs/")]
    assert len(lines) == 6, "each task is measured by one process"
    assert ["mean of own tasks" in out for _, out in ended] == [True, False], "the first shows the results"
    # A process with an error waits for the other, which goes on.
    ended = processes("eval_ood", "only=[ifeval,boolq]", "data_dir=rows", "limit=2")
    assert 1 in [status for status, _ in ended]
    assert [*measured("runs/a", "eval_ood")] == [*measured("runs/b", "eval_ood")] == ["boolq"]


@pytest.mark.parametrize("family", slow_but(["gemma3"], CASES))
def test_a_folder_of_each_family(family: str, there: Path) -> None:
    vocab_size = write_tokenizer(there / "folder")
    config = copy.deepcopy(CASES[family].config)
    config.vocab_size, config.max_position_embeddings = vocab_size, 1024
    transformers_model(config).save_pretrained(there / "folder")
    write_rows(there / "rows", ["boolq.jsonl", "bbh/navigate.jsonl"])
    asked = ["only=[boolq,bbh_fewshot]", "data_dir=rows", "limit=3", "model=folder", "output_dir=out"]
    assert evaluate("eval_ood", *asked) == 0
    assert {*measured("out", "eval_ood")} == {"boolq", "bbh_fewshot_navigate", "bbh_fewshot"}


def test_unseen_tasks(there: Path) -> None:
    """Files that the run has read are not asked, nor prompts that it has trained on."""
    tasks = sorted((there / "data" / "tasks").iterdir())
    unseen = json.loads(tasks[3].read_text())
    trained = json.loads(tasks[0].read_text())
    # In an unseen file, prompts of a file that was trained on: all but those that were held out.
    unseen["Instances"] += trained["Instances"]
    tasks[3].write_text(json.dumps(unseen))
    assert evaluate("eval_unseen", "runs=[runs/a]", "unseen_tasks.path=data", "limit=null") == 0
    ((task, score),) = measured("runs/a", "eval_unseen").items()
    assert task == TYPES[3] and score["family"] == "unseen tasks"
    assert score["left_out"] == {"trained on": 30 - 5 - 4} and score["num_examples"] == 30 + 5 + 4
    assert evaluate("eval_unseen", "runs=[runs/b]", "unseen_tasks.path=data", "limit=7") == 0
    assert measured("runs/b", "eval_unseen")[task]["num_examples"] == 7
    for file in tasks[3:]:
        file.unlink()
    with pytest.raises(ValueError, match="unseen_tasks: runs/a has trained on all files of this source"):
        evaluate("eval_unseen", "runs=[runs/a]", "unseen_tasks.path=data")


@pytest.mark.parametrize("suite", ["eval_ood", "eval_mos"])
def test_benchmarks(suite: str, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What has no data here and needs the hub is named, and the others go on."""
    write_rows(there / "rows")
    questions = [{"question_id": 81, "category": "writing", "turns": ["Who?", "Why?"]}]
    questions.append({"question_id": 82, "category": "math", "turns": ["What is 1 + 1?"]})
    (there / "rows" / "mt_bench.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    short = ["limit=2", "data_dir=rows", "model=models/base", "output_dir=runs/base"]
    status = evaluate(suite, *short)
    out, err = capsys.readouterr()
    scores = records.scores_of(Path("runs/base"), suite)
    if suite == "eval_mos":
        assert status == 0
        assert [*scores] == ["mmlu_anatomy", "mmlu_world_religions", "mt_bench", "mmlu"]
        assert scores["mmlu"].data == "2 of 57 parts" and scores["mmlu"].num_examples == 4
        file = there / "runs/base/evaluation/eval_mos/mt_bench_answers.jsonl"
        answers = [json.loads(line) for line in file.read_text().splitlines()]
        assert [answer["question_id"] for answer in answers] == [81, 82]
        assert [len(answer["choices"][0]["turns"]) for answer in answers] == [2, 1]
        second = read_samples(Path("runs/base"), suite, "mt_bench")[1].prompt
        assert answers[0]["choices"][0]["turns"][0] in second and "Who?" in second and "Why?" in second
        return
    assert status == 1
    for name, needs in (("squadv2", "metric squad_v2"), ("ifeval", "pip install langdetect")):
        assert f"error: {name}: cannot be measured: " in err and needs in err and f"not measured: {name}" in out
    assert "left out, because they execute code of the model: humaneval_instruct, mbpp_instruct" in out
    expected = ["arc_challenge", "hellaswag", "winogrande", "bbh_fewshot_boolean_expressions", "bbh_fewshot_navigate"]
    assert [*scores] == [*expected, "gsm8k", "boolq", "drop", "bbh_fewshot"]
    assert "mean of reading comprehension" in out and "mean over tasks" in out


def test_code_is_not_executed_unless_allowed(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(there / "rows", ["boolq.jsonl"])
    only = ["only=[humaneval_instruct,boolq]", "allow_code_execution=true"]
    status = evaluate("eval_ood", "data_dir=rows", "limit=1", *only, "runs=[runs/a]")
    assert status == 1 and "a folder code_eval/ here with code_eval.py" in capsys.readouterr().err
    assert [*measured("runs/a", "eval_ood")] == ["boolq"]


def test_a_model_folder_alone(there: Path) -> None:
    """Without a run, benchmarks can be asked; a base model has no chat template."""
    write_model(there / "plain", chat_template=False)
    write_rows(there / "rows", ["boolq.jsonl"])
    asked = ["only=[boolq]", "data_dir=rows", "model=plain", "output_dir=runs/plain"]
    with pytest.raises(ValueError, match="plain has no chat template"):
        evaluate("eval_ood", *asked)
    assert evaluate("eval_ood", *asked, "chat_template=false") == 0
    with pytest.raises(ValueError, match="own_tasks: needs a run"):
        evaluate("eval_tasks", "model=models/base", "output_dir=runs/plain")


def unfinish(there: Path) -> None:
    (there / "runs/a/summary.json").unlink()


def change_data(there: Path) -> None:
    file = sorted((there / "data" / "tasks").iterdir())[0]
    file.write_text(file.read_text().replace(" 3 ", " three "))


def remove_template(there: Path) -> None:
    (there / "runs/a/model/chat_template.jinja").unlink()


def change_template(there: Path) -> None:
    file = there / "runs/a/model/chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_start|>", "<|im_start|>x"))


def never_stop(there: Path) -> None:
    ByteTokenizer(supervise_end=False).save(there / "runs/a/model")
    (there / "runs/a/model/chat_template.jinja").unlink()


def remove_weights(there: Path) -> None:
    (there / "runs/a/model/model.safetensors").unlink()


def measure_with_limit(there: Path) -> None:
    evaluate("eval_tasks", "runs=[runs/a]", "only=[Summarization]", "limit=1")


def write_other_format(there: Path) -> None:
    (there / "runs/a" / EVALUATION).write_text('{"format": 0}')


def write_same_name(there: Path) -> None:
    write_natural_instructions(there / "more", ["Summarization"], num_examples=9)


def nothing(there: Path) -> None: ...


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (
            unfinish,
            [],
            "runs: runs/a is not finished, so it has no model/; tune run sft_full_finetune --config "
            "runs/a/resolved.yaml resume=true finishes it",
        ),
        (nothing, ["runs=[runs/c]"], "runs: runs/c holds no run"),
        (nothing, ["runs=[]"], "runs, model: give at least one: runs=["),
        (nothing, ["model=models/base"], "model, output_dir: give both, or neither"),
        (nothing, ["model=models", "output_dir=runs/base"], "model: models is no Hugging Face folder"),
        (nothing, ["model=models/base", "output_dir=runs/a"], "output_dir: runs/a is one of the runs"),
        (
            nothing,
            ["only=[Summarisation]"],
            "only: eval_tasks has no task 'Summarisation'; did you mean 'Summarization'?",
        ),
        (nothing, ["own_tasks=false"], "benchmarks, own_tasks, unseen_tasks, mt_bench: the suite measures nothing"),
        (nothing, ["mt_bench=mt_bench.jsonl"], "data_dir: mt_bench needs it"),
        (nothing, ["backend=vllm"], "backend: vllm is not installed; pip install vllm, or choose backend: hf"),
        (nothing, ["backend=vlm"], "backend: has to be 'hf' or 'vllm', not \"vlm\""),
        (
            nothing,
            ["benchmarks.arc={family: x, metric: acc, files: y}"],
            "unknown key 'benchmarks.arc.files'; did you mean",
        ),
        (nothing, ["benchmarks.arc={family: x}"], "missing key 'benchmarks.arc.metric'"),
        (nothing, ["benchmarks.arc_chalenge={family: x, metric: acc}"], "did you mean 'arc_challenge'?"),
        (
            write_same_name,
            ["unseen_tasks={_component_: adapt_recipes.data.natural_instructions, path: more}"],
            "eval_tasks: two of its tasks have the name 'Summarization'; measure them as two suites",
        ),
        (nothing, ["mt_bench=mt_bench.jsonl", "data_dir=data"], "data/mt_bench.jsonl: no such file; it is fastchat/"),
        (change_data, [], "own_tasks: the data of runs/a, or the chat template in runs/a/model, is not what it was"),
        (
            change_template,
            [],
            "own_tasks: the data of runs/a, or the chat template in runs/a/model, is not what it was",
        ),
        (never_stop, [], "runs/a/model: its chat template ends no answer with a special token"),
        (remove_template, [], "runs/a/model has no chat template"),
        (remove_weights, [], "runs/a/model: holds no weights of a model"),
        (measure_with_limit, [], "limit: eval_tasks was measured with 1"),
        (write_other_format, [], "has the format 0, and this version reads 1"),
    ],
)
def test_bad_input(
    change: Callable[[Path], None], overrides: list[str], message: str, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(there)
    capsys.readouterr()
    runs = [] if any(each.startswith("runs=") for each in overrides) else ["runs=[runs/a]"]
    argv = ["--config", str(SUITES["eval_tasks"]), *SHORT, *runs, *overrides]
    assert exit_status("mixture_eval", argv) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1 and err.startswith("error: ")


def test_a_task_without_questions_is_named(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one whose conversations all end in a call of a tool."""
    monkeypatch.setattr(mixture_eval, "questions_of", lambda *_, **__: ([], 4))
    with pytest.raises(ValueError, match="^task 'Summarization': no example ends in an answer of text"):
        evaluate("eval_tasks", "runs=[runs/a]", "only=[Summarization]")


def test_without_the_extra(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"^it needs lm_eval; pip install 'adapt-recipes\[eval\]'$"):
        evaluate("eval_tasks", "runs=[runs/a]")


def test_a_full_disk_loses_nothing(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose samples or score cannot be written is measured by the next call."""
    assert evaluate("eval_tasks", "runs=[runs/a]", "only=[Summarization]") == 0
    before = (there / "runs/a" / EVALUATION).read_text()

    def full(path: Path) -> None:
        if path.is_relative_to("runs"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left while writing .*jsonl"):
        patch.setattr("adapt_recipes.files.fsync", full)
        evaluate("eval_tasks", "runs=[runs/a]")
    assert (there / "runs/a" / EVALUATION).read_text() == before
    assert not [*(there / "runs/a").rglob("*.partial")]
    assert evaluate("eval_tasks", "runs=[runs/a]") == 0
    assert {*measured("runs/a", "eval_tasks")} == {*TRAINED}


def test_the_suites_are_listed(there: Path) -> None:
    assert {*SUITES} == {name for name in shipped("yaml", ".yaml") if name.startswith("eval_")}
    for suite, path in SUITES.items():
        config = load(mixture_eval.Config, path)
        assert config.suite == suite and config.recipe == "mixture_eval"
        assert f"tune run mixture_eval --config yaml/{suite}.yaml" in path.read_text()


def test_the_answer_of_a_model_is_its_greedy_one(there: Path) -> None:
    """Token by token, from the logits of transformers."""
    from transformers import AutoModelForCausalLM

    assert evaluate("eval_tasks", "runs=[runs/a]", "only=[Summarization]", "limit=2") == 0
    model = AutoModelForCausalLM.from_pretrained("runs/a/model").eval()
    tokenizer = ChatTokenizer("runs/a/model")
    for sample in read_samples(Path("runs/a"), "eval_tasks", "Summarization"):
        ids = tokenizer._encoding(sample.prompt)[1].ids
        answer: list[int] = []
        with torch.no_grad():
            while len(answer) < 4 and not {*answer} & {*tokenizer.end_ids}:
                answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
        text = tokenizer._tokenizer.decode([each for each in answer if each not in tokenizer.end_ids])
        assert sample.answer == text.strip()
