"""What a person does with a finished run: every command of the command line, and the exported
weights in a fresh process that has another seed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import LORA, PISSA, metrics, train, write_config

import ssm_train
from ssm_train.adapters.base import ModelSpec
from ssm_train.adapters.registry import resolve
from ssm_train.cli import main
from ssm_train.commands import BAD_INPUT, DONE
from ssm_train.config import load_config

RUNS = {
    "gla_lora": ("gla", LORA),
    "gla_pissa": ("gla", PISSA),
    "mamba_lora": ("mamba", LORA),
    "mamba_pissa": ("mamba", PISSA | {"use_dora": True}),
    "mamba_full": ("mamba", None),
    "mamba_new": ("mamba", LORA),
}
"""Name -> family and PEFT; all but the last start from a base that a run config made."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """name -> (result, what the terminal showed) of each of RUNS."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    directory = tmp_path_factory.mktemp("finished")
    results = {}
    for name, (family, peft) in RUNS.items():
        changes = {"peft": peft, "eval_at_start": True, "eval_gen": {"max_new_tokens": 6}}
        changes |= {"test_data": str(directory / "test.jsonl"), "logging_steps": 4}
        if name != "mamba_new":
            base = write_config(directory, f"{family}_base", family, skip_eval=True, max_steps=20)
            changes |= {"new_model": None, "tokenizer": None, "model": str(base)}
        config = write_config(directory, name, family, **changes)
        out, error = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(error):
            results[name] = train(config), out, error
    return {
        name: (r, out.getvalue(), error.getvalue()) for name, (r, out, error) in results.items()
    }


def run_dir(finished, name):
    return finished[name][0].run_dir


def test_the_terminal_shows_what_a_person_needs_and_no_noise(finished):
    for name, (result, out, error) in finished.items():
        assert error == "", (name, error)
        said = out[out.index("outcome ", out.index(f"run {result.run_dir}")) :]
        for label in (
            *("outcome", "bleu before", "bleu after", "bleu on test"),
            *("trainable", "tokens/s", "example", "predicted", "expected", "plot", "record"),
            *("model" if name == "mamba_full" else "adapter", "load it"),
        ):
            assert label in said, (name, label)
        assert "finished after 8 steps" in said
        assert f'ssm_train.load_run("{result.run_dir}")' in said
        assert str(result.exported) in said and result.exported.is_dir()


@pytest.mark.parametrize("name", RUNS)
def test_eval_repeats_what_the_run_measured(name, finished, capsys):
    result = finished[name][0]
    for split, expected in (("val", result.after), ("test", result.test)):
        assert main(["eval", str(result.run_dir), "--split", split, "--json"]) == DONE
        assert json.loads(capsys.readouterr().out) == pytest.approx(expected, abs=1e-5)
    assert main(["eval", str(result.run_dir), "--checkpoint", "last"]) == DONE
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    last = metrics(result.run_dir, "val")[-1]
    assert float(said["loss"]) == pytest.approx(last["loss"], abs=1e-3)
    assert said["tokens"].isdigit()


def test_eval_takes_other_data_and_any_split(finished, capsys, tmp_path):
    """`--data` wins over the run's own test_data; a training split is evaluated whole."""
    directory = run_dir(finished, "gla_lora")
    cfg, _ = load_config(directory / "cfg.yaml")
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(cfg.test_data).read_text().splitlines(keepends=True)[:3]))
    tokens = {}
    for words in ("", f"--data {few}", f"--data {few} --split test", "--split train"):
        assert main(["eval", str(directory), *words.split(), "--json"]) == DONE, words
        tokens[words.replace(str(few), "few")] = json.loads(capsys.readouterr().out)["tokens"]
    assert tokens["--data few"] == tokens["--data few --split test"] < tokens[""]
    assert tokens["--split train"] > tokens["--data few"]
    assert main(["eval", str(directory), "--split", "tset"]) == BAD_INPUT
    assert "error: data: the file" in (said := capsys.readouterr().err)
    assert "has no split 'tset'; known: train, val, test" in said
    assert main(["eval", str(directory), "--data", "nope"]) == BAD_INPUT
    assert capsys.readouterr().err.startswith("error: --data: nope is neither a file nor a data")
    assert main(["eval", str(directory), "--data", str(few), "--split", "tset"]) == BAD_INPUT
    assert capsys.readouterr().err.startswith(f"error: --data: the file {few} has no split 'tset'")


def test_eval_of_a_test_split_that_is_not_there(finished, capsys, tmp_path):
    """Said before a model is looked for, which this directory does not have."""
    cfg = (run_dir(finished, "gla_lora") / "cfg.yaml").read_text()
    (tmp_path / "cfg.yaml").write_text(
        re.sub(r"^test_data: .*", "test_data: null", cfg, flags=re.M)
    )
    assert main(["eval", str(tmp_path), "--split", "test"]) == BAD_INPUT
    said = capsys.readouterr().err
    assert said.startswith("error: --split test: data is the one file")
    assert said.endswith("has no 'test' split; set test_data, or give --data\n")


def test_generate_says_what_the_predictions_say(finished, capsys, tmp_path):
    result = finished["gla_lora"][0]
    steps = sorted(
        int(p.stem.split("-")[1]) for p in result.run_dir.glob("predictions-[0-9]*.jsonl")
    )
    assert steps == [0, 4, 8]
    file = result.run_dir / f"predictions-{result.best_step}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 9
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(row["input"] for row in rows), encoding="utf-8")
    command = ["generate", str(result.run_dir), "--file", str(prompts), "--max-new-tokens", "6"]
    assert main(command) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [row["prediction"].split() for row in rows]
    assert main([*command, "--num-beams", "2"]) == DONE


def test_warmup_needs_a_gpu(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = write_config(tmp_path, "run", "gla")
    assert main(["warmup", "--cfg", str(config)]) == BAD_INPUT
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "error: warmup tunes kernels for the GPU that runs them, and there is none here"
    ]


def test_plot_and_doctor(finished, capsys, tmp_path):
    result = finished["mamba_lora"][0]
    out = tmp_path / "both.png"
    command = ["plot", str(result.run_dir), str(run_dir(finished, "gla_lora")), "--out", str(out)]
    assert main(command) == DONE
    (tmp_path / "report.txt").write_text("beside the runs, as `*` brings it")
    assert main([*command[:3], str(tmp_path / "report.txt"), *command[3:]]) == DONE
    for png in (out, result.run_dir / "metrics.png"):
        data = png.read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5_000
    capsys.readouterr()
    assert main(["doctor", "--json"]) == DONE
    assert json.loads(capsys.readouterr().out)
    assert main(["doctor"]) == DONE
    assert "torch" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == DONE
    assert capsys.readouterr().out == f"ssm_train {ssm_train.__version__}\n"


@pytest.mark.parametrize(
    "command", ["train", "eval", "generate", "merge", "plot", "warmup", "slurm", "doctor"]
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == DONE
    said = capsys.readouterr().out
    assert f"usage: ssm-train {command}" in said and "example:" in said


FRESH = """
import json, sys
from pathlib import Path
import torch
torch.manual_seed(977)
cases = json.loads(Path(sys.argv[1], "cases.json").read_text())
ids = torch.tensor(json.loads(Path(sys.argv[1], "ids.json").read_text()))

import transformers
logits = {}
with torch.no_grad():
    for name, directory in cases["full"].items():
        model = transformers.AutoModelForCausalLM.from_pretrained(directory)
        assert type(model).__module__.startswith("transformers."), type(model)
        logits[name] = model(input_ids=ids).logits
    assert not any(module.startswith("ssm_train") for module in sys.modules)

    import fla.models
    import ssm_train.peft
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file, save_file
    for name, directory in cases["adapters"].items():
        config = json.loads(Path(directory, "adapter_config.json").read_text())
        base = config["base_model_name_or_path"]
        model_type = json.loads(Path(base, "config.json").read_text())["model_type"]
        classes = {"gla": fla.models.GLAForCausalLM, "mamba": transformers.MambaForCausalLM}
        model = PeftModel.from_pretrained(classes[model_type].from_pretrained(base), directory)
        written = load_file(Path(directory, "adapter_model.safetensors"))
        held = get_peft_model_state_dict(model, save_embedding_layers=False)
        assert held.keys() == written.keys()
        assert all(torch.equal(held[key], tensor) for key, tensor in written.items())
        logits[name] = model.eval()(input_ids=ids).logits
save_file({k: v.contiguous() for k, v in logits.items()}, Path(sys.argv[1], "logits.safetensors"))
"""


def test_exported_weights_in_a_fresh_process(finished, tmp_path, capsys):
    """Merged and fully trained Mambas with transformers alone, adapters with PEFT: the logits of
    load_run(), which are those of the best step."""
    ids = torch.randint(3, 12, (2, 17), generator=torch.Generator().manual_seed(1))
    expected, full, adapters = {}, {}, {}
    for name in RUNS:
        model, tokenizer = ssm_train.load_run(run_dir(finished, name))
        assert tokenizer.eos_token_id is not None
        with torch.no_grad():
            expected[name] = model(input_ids=ids).logits
        if name == "mamba_full":
            full[name] = str(run_dir(finished, name) / "model")
            continue
        adapters[name] = str(run_dir(finished, name) / "adapter")
        merged = tmp_path / f"{name}_merged"
        assert main(["merge", str(run_dir(finished, name)), "--out", str(merged)]) == DONE
        assert str(merged) in capsys.readouterr().out
        if name.startswith("mamba"):  # stock fla runs on GPUs only
            full[f"{name}_merged"] = str(merged)
            expected[f"{name}_merged"] = expected[name]
    (tmp_path / "cases.json").write_text(json.dumps({"full": full, "adapters": adapters}))
    (tmp_path / "ids.json").write_text(json.dumps(ids.tolist()))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    logits = load_file(tmp_path / "logits.safetensors")
    assert logits.keys() == expected.keys()
    for name, values in logits.items():
        torch.testing.assert_close(values, expected[name], atol=1e-5, rtol=1e-5, msg=name)
    base_logits = logits["mamba_full"]
    assert (logits["mamba_lora"] - base_logits).abs().max() > 1e-3  # there is something to compare


def test_merge_writes_the_original_format_of_mamba_ssm(finished, tmp_path, capsys):
    """A base for other runs, like one that mamba_ssm wrote."""
    ids = torch.randint(3, 12, (2, 17), generator=torch.Generator().manual_seed(1))
    run, out = run_dir(finished, "mamba_pissa"), tmp_path / "original"
    command = ["merge", str(run), "--out", str(out), "--format", "mamba_ssm"]
    assert main(command) == DONE
    said = capsys.readouterr().out
    difference = float(said.split("differ by ")[1].split()[0])
    assert 0 <= difference < 1e-5 and f"{difference:.1e} of" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["ssm_cfg"] == {"d_state": 4, "dt_rank": 4}
    spec = ModelSpec(model=str(out))
    adapter, reason = resolve(spec)
    assert "mamba_ssm's own" in reason
    expected, _ = ssm_train.load_run(run)
    with torch.no_grad():
        logits = adapter.prepare(spec).model(input_ids=ids).logits
        torch.testing.assert_close(logits, expected(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_a_refused_merge_writes_nothing(finished, tmp_path, capsys, monkeypatch):
    out = tmp_path / "merged"
    command = ["merge", str(run_dir(finished, "mamba_lora")), "--out", str(out)]
    assert main([*command, "--tolerance", "0"]) == BAD_INPUT
    assert "more than the tolerance 0.0e+00" in capsys.readouterr().err
    assert main([*command, "--tolerance", "2"]) == BAD_INPUT
    assert "--tolerance: '2' is not a number from 0 to 1" in capsys.readouterr().err
    assert main([*command, "--format", "gguf"]) == BAD_INPUT
    assert "'gguf'" in capsys.readouterr().err
    monkeypatch.setattr("ssm_train.peft.merge.merge_adapter", None)  # not reached
    command = ["merge", str(run_dir(finished, "gla_lora")), "--out", str(out)]
    assert main([*command, "--format", "mamba_ssm"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "this model is gla; use the format transformers" in error
    assert not out.exists()


def test_what_a_run_does_not_have_is_said(finished, tmp_path, capsys):
    full = run_dir(finished, "mamba_full")
    assert main(["merge", str(full), "--out", str(tmp_path / "merged")]) == BAD_INPUT
    assert f"its full weights are in {full}/model" in capsys.readouterr().err
    assert main(["eval", str(full), "--checkpoint", "5"]) == BAD_INPUT
    assert "has checkpoints of steps: " in capsys.readouterr().err
