"""Commands: good ones write what they promise, bad ones exit with 2, say why, and leave nothing behind."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from svdit.plans.schema import dumps, read_plan
from svdit.plans.search_state import read_state
from svdit.runtime import cli, search_cli
from svdit.runtime.search_cli import default_state
from svdit.trt_plugins import onnxruntime_library
from tests.runtime.conftest import PROMPTS

PROMPT = ("--prompt", PROMPTS[0])


def invoke(command, *arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments])


@pytest.mark.parametrize("command", [cli.run, cli.compare, search_cli.main])
def test_help(command):
    done = invoke(command, "--help")
    assert done.exit_code == 0 and "--prompt" in done.output and "--json" in done.output


def test_run_writes_videos_sheets_and_figures(bundles, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"# two\n\n{PROMPTS[1]}\n")
    done = invoke(
        cli.run,
        bundles / "portable",
        *PROMPT,
        "--prompts",
        tmp_path / "prompts.txt",
        "--steps",
        3,
        "--seed",
        4,
        "-o",
        tmp_path / "v.mp4",
        "--json",
        tmp_path / "v.json",
    )
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "v.json").read_text())
    assert (
        data["backend"] == "onnxrt" and data["steps"] == 3 and data["stages"] == [0, 1, 2] and len(data["step_ms"]) == 3
    )
    assert [(v["prompt"], v["seed"]) for v in data["videos"]] == [(PROMPTS[0], 4), (PROMPTS[1], 5)]
    assert {f.name for f in tmp_path.iterdir()} == {"prompts.txt", "v.json", "v-0.mp4", "v-0.png", "v-1.mp4", "v-1.png"}
    assert Image.open(tmp_path / "v-0.png").size[0] > 4 * 96
    assert (tmp_path / "v-0.mp4").stat().st_size > 1000


def test_run_of_one_prompt_uses_the_name_as_it_is(bundles, tmp_path):
    done = invoke(cli.run, bundles / "plugin", *PROMPT, "--steps", 1, "-o", tmp_path / "v.mp4", "--backend", "torch")
    assert done.exit_code == 0, done.output
    assert {f.name for f in tmp_path.iterdir()} == {"v.mp4", "v.png"}


def test_search_writes_a_plan_and_chooses_again(checkpoint, tmp_path):
    plan, again = tmp_path / "p.plan.json", tmp_path / "q.plan.json"
    done = invoke(
        search_cli.main,
        "--model",
        "tiny",
        "--checkpoint",
        checkpoint,
        *PROMPT,
        "--steps",
        3,
        "--tile",
        "1,2,3",
        "-o",
        plan,
        "--json",
        tmp_path / "f.json",
    )
    assert done.exit_code == 0, done.output
    assert default_state(plan).name == "p.search.npz"
    assert {f.name for f in tmp_path.iterdir()} == {"p.plan.json", "p.search.npz", "f.json"}
    found, figures = read_plan(plan), json.loads((tmp_path / "f.json").read_text())
    assert found.provenance["prompts"] == [PROMPTS[0]] and found.provenance["method"] == "sparse-vdit"
    assert figures["density"] == found.provenance["density"] and figures["stages"] == len(found.stages)
    done = invoke(
        search_cli.main,
        "--from-state",
        tmp_path / "p.search.npz",
        "--density",
        0.3,
        "--dense-steps",
        0,
        "--max-stages",
        1,
        "-o",
        again,
    )
    assert done.exit_code == 0, done.output
    assert read_plan(again).provenance["density"] <= 0.3 and len(read_plan(again).stages) == 1
    assert read_plan(again).provenance["choice"] == "open loop"


def edited(bundle, name, edit):
    def change(folder):
        path = folder / name
        path.write_text(edit(path.read_text()))

    return bundle, change


def manifest(bundle, **changes):
    def edit(text):
        return json.dumps({**json.loads(text), **changes})

    return edited(bundle, "manifest.json", edit)


BROKEN_BUNDLES = {
    "no manifest": (("portable", lambda f: (f / "manifest.json").unlink()), "manifest.json: got no such file"),
    "manifest not JSON": (edited("portable", "manifest.json", lambda t: t[:50]), "manifest.json"),
    "manifest of another format": (manifest("portable", format="onnx"), r'format: got "onnx"; expected .*svdit-bundle'),
    "manifest version 2": (manifest("portable", version=2), r"version: got 2; expected 1"),
    "manifest without inputs": (
        edited(
            "portable", "manifest.json", lambda t: json.dumps({k: v for k, v in json.loads(t).items() if k != "inputs"})
        ),
        r"\$\.inputs: got nothing",
    ),
    "unknown key": (manifest("portable", colour="red"), r"\$\.colour: got an unknown key"),
    "unknown variant": (manifest("portable", variant="fast"), "variant"),
    "unknown model": (manifest("portable", model="huge"), r"\$\.model: got"),
    "no checkpoint": (
        manifest("plugin", checkpoint="/no/such/folder"),
        "checkpoint: got /no/such/folder; expected an existing",
    ),
    "plan edited": (
        edited("portable", "plan.json", lambda t: t.replace("template", "by hand")),
        "plan.json: sha256: got",
    ),
    "plan gone": (("portable", lambda f: (f / "plan.json").unlink()), "plan.json: got no such file"),
    "graph gone": (("portable", lambda f: (f / "dit.stage1.onnx").unlink()), "dit.stage1.onnx: got no such file"),
    "graph edited": (("portable", lambda f: (f / "dit.stage0.onnx").write_bytes(b"x")), "dit.stage0.onnx: sha256: got"),
    "weights gone": (("portable", lambda f: next(f.glob("*.safetensors")).unlink()), "safetensors: got"),
}


@pytest.mark.parametrize("case", BROKEN_BUNDLES)
def test_broken_bundles(bundles, tmp_path, case):
    (source, change), message = BROKEN_BUNDLES[case]
    folder, out = tmp_path / "bundle", tmp_path / "out"
    shutil.copytree(bundles / source, folder, symlinks=True)
    out.mkdir()
    change(folder)
    for command, extra in ((cli.run, ("-o", out / "v.mp4")), (cli.compare, ("--report", out / "r.html"))):
        done = invoke(command, folder, *PROMPT, "--steps", 1, *extra, "--json", out / "f.json")
        assert done.exit_code == 2, done.output
        assert re.search(message, done.stderr), done.stderr
        assert list(out.iterdir()) == []


def test_a_graph_that_onnxruntime_refuses(bundles, tmp_path):
    """Hashes are right, the file is not ONNX."""
    from svdit.plans.bundle import sha256_of

    folder = tmp_path / "bundle"
    shutil.copytree(bundles / "portable-dense", folder, symlinks=True)
    (folder / "dit.onnx").write_bytes(b"not a graph")
    data = json.loads((folder / "manifest.json").read_text())
    data["graphs"][0]["sha256"] = sha256_of(folder / "dit.onnx")
    (folder / "manifest.json").write_text(json.dumps(data))
    done = invoke(cli.run, folder, *PROMPT, "-o", tmp_path / "v.mp4")
    assert done.exit_code == 2 and "dit.onnx: got ONNX Runtime:" in done.stderr
    assert not (tmp_path / "v.mp4").exists()


BAD_RUNS = {
    "no bundle": (("none", *PROMPT), "none: got no folder; expected a bundle folder"),
    "no prompt": (("{portable}",), "prompts: got none; expected at least one prompt; pass --prompt TEXT"),
    "empty prompt": (("{portable}", "--prompt", " "), r"prompts\[0\]: got ' '; expected text"),
    "unknown word": (("{portable}", "--prompt", "red elephant moving right"), "elephant"),
    "no prompts file": (("{portable}", "--prompts", "none.txt"), "none.txt: got no such file"),
    "prompts file empty": (("{portable}", "--prompts", "empty.txt"), "empty.txt: got no prompts"),
    "unknown backend": (
        ("{portable}", *PROMPT, "--backend", "onnx"),
        "backend: got 'onnx'; expected one of auto, tensorrt",
    ),
    "tensorrt": (("{portable}", *PROMPT, "--backend", "tensorrt"), "engine.json: got no such file; .* svdit-build"),
    "onnxrt-cuda": (
        ("{portable}", *PROMPT, "--backend", "onnxrt-cuda"),
        "variant: got 'portable'; expected 'plugin' for the backend onnxrt-cuda",
    ),
    "onnxrt on a plugin": (
        ("{plugin}", *PROMPT, "--backend", "onnxrt"),
        r"variant: got 'plugin'; expected 'portable'.* without libsvdit_onnxruntime.so; build it \(cmake -S",
    ),
    "device for onnxrt": (("{portable}", *PROMPT, "--device", "cuda"), "device: got 'cuda'; expected 'cpu'"),
    "no such device": (
        ("{plugin}", *PROMPT, "--device", "abacus"),
        "device: got 'abacus'; expected cpu, cuda or cuda:N",
    ),
    "no steps": (("{portable}", *PROMPT, "--steps", "0"), "steps: got 0; expected an integer >= 1"),
    "steps not a number": (("{portable}", *PROMPT, "--steps", "few"), "'few' is not a valid integer"),
    "negative seed": (("{portable}", *PROMPT, "--seed", "-1"), "seed: got -1"),
    "guidance": (("{portable}", *PROMPT, "--guidance", "nan"), "guidance: got nan"),
    "threads": (("{portable}", *PROMPT, "--threads", "0"), "0 is not in the range"),
    "fps": (("{portable}", *PROMPT, "--fps", "0"), "0 is not in the range"),
    "no such option": (("{portable}", *PROMPT, "--sed", "1"), "No such option"),
    "output suffix": (
        ("{portable}", *PROMPT, "-o", "v.gif"),
        r"--output: got v.gif; expected a file name that ends in \.mp4",
    ),
    "output folder": (
        ("{portable}", *PROMPT, "-o", "none/v.mp4"),
        "--output: got none/v.mp4; expected an existing folder",
    ),
    "json folder": (("{portable}", *PROMPT, "--json", "none/f.json"), "--json: got none/f.json"),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_runs(bundles, tmp_path, monkeypatch, case):
    arguments, message = BAD_RUNS[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(onnxruntime_library, "find", lambda: None)
    (tmp_path / "empty.txt").write_text("# nothing\n")
    done = invoke(cli.run, *(a.format(portable=bundles / "portable", plugin=bundles / "plugin") for a in arguments))
    assert done.exit_code == 2, done.output
    assert re.search(message, done.stderr), done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["empty.txt"]


GOOD_SEARCH = {
    "--model": "tiny",
    "--checkpoint": "{checkpoint}",
    "--prompt": PROMPTS[0],
    "--steps": "1",
    "-o": "p.plan.json",
}
BAD_SEARCHES = {
    "no model": ({"--model": None}, "--model: got nothing; expected one of cogvideox1.5, hunyuan, tiny, wan2.1"),
    "unknown model": ({"--model": "sora"}, "model: got 'sora'; expected one of"),
    "no checkpoint": ({"--checkpoint": "none"}, "checkpoint: got none; expected an existing folder"),
    "empty checkpoint": ({"--checkpoint": "."}, r"checkpoint"),
    "unknown method": ({"--method": "greedy"}, "--method: got 'greedy'; expected one of sparse-vdit, budget, svg"),
    "no target": ({"--method": "budget"}, "--method budget: got no target; expected one of --target-speedup"),
    "two targets": (
        {"--method": "budget", "--target-speedup": "2", "--target-error": "1"},
        "--method budget: got --target-speedup, --target-error; expected one of",
    ),
    "budget with lam": (
        {"--method": "budget", "--target-speedup": "2", "--lam": "1"},
        "--method budget: got --lam; expected options of this method only",
    ),
    "target without budget": ({"--target-speedup": "2"}, "--method sparse-vdit: got --target-speedup"),
    "slow-down": ({"--method": "budget", "--target-speedup": "0.5"}, "--target-speedup: got 0.5; expected a number of"),
    "target density": ({"--method": "budget", "--target-density": "1.5"}, "--target-density: got 1.5; expected a num"),
    "spread": ({"--method": "budget", "--target-density": "0.5", "--spread": "0"}, "--spread: got 0.0; expected a num"),
    "hardware": ({"--method": "budget", "--target-speedup": "2", "--hardware": "abacus"}, "--hardware: got 'abacus'"),
    "rival without density": ({"--method": "svg"}, "--density: got nothing; expected a density for svg"),
    "rival too sparse": (
        {"--method": "svg", "--density": "0.1"},
        "--density: got 0.1; expected more than the 1 of the dense steps; give fewer dense steps",
    ),
    "no prompt": ({"--prompt": None}, "prompts: got none"),
    "lam": ({"--lam": "-1"}, "lam: got -1.0; expected a finite number >= 0"),
    "eps": ({"--eps": "nan"}, "eps: got nan"),
    "error scale": ({"--error-scale": "inf"}, "error_scale: got inf"),
    "dense steps": ({"--dense-steps": "2"}, "dense_steps: got 2.0; expected a share of the steps"),
    "normaliser": ({"--normaliser": "none"}, "normaliser: got 'none'; expected layer or head"),
    "max stages": ({"--max-stages": "0"}, "max_stages: got 0"),
    "tile words": ({"--tile": "big"}, "--tile: got 'big'; expected three integers such as 1,8,16"),
    "tile of two": ({"--tile": "8,16"}, "tile"),
    "tile too large": ({"--tile": "16,16,16"}, "tile: got 16 x 16 x 16"),
    "candidates gone": ({"--candidates": "none.json"}, "none.json: got no such file"),
    "candidates broken": ({"--candidates": "broken.json"}, r'broken.json: \$\.a\.kind: got "spiral"'),
    "query tiles": ({"--query-tiles": "9999"}, "query_tiles: got 9999"),
    "device": ({"--device": "abacus"}, "device: got 'abacus'"),
    "dtype": ({"--dtype": "float8"}, "dtype: got 'float8'"),
    "steps": ({"--steps": "0"}, "steps: got 0"),
    "output suffix": ({"-o": "p.yaml"}, "--output: got p.yaml; expected a file name that ends in .json"),
    "output folder": ({"-o": "none/p.plan.json"}, "--output: got none/p.plan.json; expected an existing folder"),
    "broken state": ({"--state": "broken.json"}, "broken.json: got an unreadable file"),
    "state and settings": ({"--from-state": "broken.json"}, r"--from-state: got also --model, --checkpoint, --prompt"),
}


@pytest.mark.parametrize("case", BAD_SEARCHES)
def test_bad_searches(checkpoint, tmp_path, monkeypatch, case):
    changes, message = BAD_SEARCHES[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text('{"a": {"kind": "spiral"}}')
    options = {name: value for name, value in {**GOOD_SEARCH, **changes}.items() if value is not None}
    done = invoke(search_cli.main, *(part.format(checkpoint=checkpoint) for pair in options.items() for part in pair))
    assert done.exit_code == 2, done.output
    assert re.search(message, done.stderr), done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["broken.json"]


def test_density_that_no_candidate_reaches(checkpoint, tmp_path):
    (tmp_path / "c.json").write_text('{"band": {"kind": "diagonal", "frames": 1}}')
    state = tmp_path / "s.search.npz"
    common = (
        "--model",
        "tiny",
        "--checkpoint",
        checkpoint,
        *PROMPT,
        "--steps",
        "1",
        "--candidates",
        tmp_path / "c.json",
        "--tile",
        "1,2,3",
        "--state",
        state,
    )
    done = invoke(search_cli.main, *common, "--density", "0.01", "-o", tmp_path / "p.plan.json")
    assert done.exit_code == 2 and "--density: got 0.01; expected at least" in done.stderr
    assert not (tmp_path / "p.plan.json").exists()
    with np.load(state) as stored:
        assert "error" in stored.files


def test_budget_search_and_another_target_from_its_state(checkpoint, tmp_path):
    """Measured along the dense trajectory; the choice says its predicted time and that it is an estimate."""
    (tmp_path / "c.json").write_text('{"skip": {"kind": "skip"}, "band": {"kind": "diagonal", "frames": 1}}')
    common = ("--method", "budget", "--json", tmp_path / "f.json", "-o", tmp_path / "p.plan.json")
    model = ("--model", "tiny", "--checkpoint", checkpoint, *PROMPT, "--steps", "2", "--tile", "1,2,3")
    done = invoke(search_cli.main, *model, "--candidates", tmp_path / "c.json", *common, "--target-density", "0.5")
    assert done.exit_code == 0, done.output
    assert "NOTE the time is an estimate: attention extrapolated" in done.output
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["method"] == "budget" and figures["density"] <= 0.5 and figures["predicted"]["estimated"]
    error = figures["weighted_error"]
    again = ("--from-state", tmp_path / "p.search.npz", *common)
    done = invoke(search_cli.main, *again, "--target-error", str(error / 2))
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["weighted_error"] <= error / 2 and figures["target"] == {"error": error / 2}
    done = invoke(search_cli.main, *again, "--target-speedup", "100")
    assert done.exit_code == 2 and "--target-speedup: got 100; expected at most" in done.stderr


def test_a_rival_without_measurement(checkpoint, tmp_path):
    plan = tmp_path / "p.plan.json"
    model = ("--model", "tiny", "--checkpoint", checkpoint, "--tile", "1,2,3", "--steps", "4", "-o", plan)
    done = invoke(search_cli.main, *model, "--method", "winattn-temporal", "--density", "0.6", "--dense-steps", "0.25")
    assert done.exit_code == 0, done.output
    assert [f.name for f in tmp_path.iterdir()] == ["p.plan.json"]
    found = read_plan(plan)
    assert [stage.until for stage in found.stages] == [0.25, 1.0] and set(found.patterns) == {"temporal"}


def test_candidates_left_out_of_a_choice(checkpoint, tmp_path):
    """The plan is that of a search that never had them; times of two rows are those of one but for launches."""
    found = {}
    specs = {"skip": {"kind": "skip"}, "near": {"kind": "diagonal"}, "place": {"kind": "multi_diagonal"}}
    size = ("--model", "tiny", "--checkpoint", checkpoint, "--tile", "1,2,3", "--steps", "2", *PROMPT)
    budget = ("--method", "budget", "--target-density", "0.4")
    for name in ("both", "alone"):
        kept = {key: spec for key, spec in specs.items() if name == "both" or key != "near"}
        (tmp_path / f"{name}.json").write_text(json.dumps(kept))
        state = ("--state", tmp_path / f"{name}.npz", "--candidates", tmp_path / f"{name}.json")
        done = invoke(search_cli.main, *budget, *size, *state, "-o", tmp_path / f"{name}.plan.json")
        assert done.exit_code == 0, done.output
    again = ("--from-state", tmp_path / "both.npz", "-o", tmp_path / "again.plan.json")
    done = invoke(search_cli.main, *budget, *again, "--without", "n*", "--batch", "2")
    assert done.exit_code == 0, done.output
    found = {name: read_plan(tmp_path / f"{name}.plan.json") for name in ("both", "alone", "again")}
    assert found["again"].stages == found["alone"].stages != found["both"].stages
    assert found["again"].patterns == found["alone"].patterns and found["again"].provenance["without"] == ["n*"]
    assert found["again"].provenance["predicted"]["batch"] == 2
    done = invoke(search_cli.main, *budget, *again, "--without", "far*")
    assert done.exit_code == 2 and "--without: got 'far*'; expected a name or glob of its 3 candidates" in done.output


def test_one_plan_from_searches_of_several_prompts(checkpoint, tmp_path):
    """The second search takes the patterns of the first, so that a plan can be chosen from both."""
    (tmp_path / "c.json").write_text('{"band": {"kind": "diagonal"}, "top": {"kind": "stripe", "columns": {"top": 2}}}')
    size = ("--model", "tiny", "--checkpoint", checkpoint, "--tile", "1,2,3", "--steps", "2")
    budget = ("--method", "budget", "--target-density", "0.4")
    one, two, both = (tmp_path / f"{name}.search.npz" for name in ("one", "two", "both"))
    for state, candidates, seed, text in ((one, tmp_path / "c.json", 0, PROMPTS[0]), (two, one, 1, PROMPTS[1])):
        more = ("--prompt", text, "--seed", str(seed), "--candidates", candidates, "--state", state)
        done = invoke(search_cli.main, *budget, *size, *more, "-o", tmp_path / "one.plan.json")
        assert done.exit_code == 0, done.output
    plan = tmp_path / "both.plan.json"
    joined = (*budget, "--from-state", one, "--from-state", two, "-o", plan)
    done = invoke(search_cli.main, *joined, "--state", both)
    assert done.exit_code == 0, done.output
    assert read_plan(plan).provenance["prompts"] == list(PROMPTS)
    assert read_plan(plan).provenance["seed"] == [0, 1] and read_plan(plan).provenance["joined"] == 2
    np.testing.assert_allclose(read_state(both).error, (read_state(one).error + read_state(two).error) / 2)
    again = tmp_path / "again.plan.json"
    done = invoke(search_cli.main, *budget, "--from-state", both, "-o", again)
    assert done.exit_code == 0 and again.read_bytes() == plan.read_bytes(), done.output
    done = invoke(search_cli.main, *joined, "--state", both)
    assert done.exit_code == 2 and "--state: got" in done.stderr and "which exists; expected a new file" in done.stderr
    done = invoke(search_cli.main, *budget, "--from-state", one, "--from-state", one, "-o", tmp_path / "no.plan.json")
    assert done.exit_code == 2 and f'prompts: got "{PROMPTS[0]}" with seed 0; expected other videos' in done.stderr
    assert not (tmp_path / "no.plan.json").exists()


def test_a_calibrated_search_weighs_errors_as_it_measured_them(checkpoint, tmp_path):
    """A finished state is calibrated without measuring again; then --spread goes back to the schedule's weights."""
    state, plan = tmp_path / "s.search.npz", tmp_path / "p.plan.json"
    size = ("--model", "tiny", "--checkpoint", checkpoint, "--tile", "1,2,3", "--steps", "3", *PROMPT)
    common = ("--method", "budget", "--target-density", "0.4", "-o", plan)
    plans = {}
    for name, more in (
        ("plain", (*size, "--state", state)),
        ("steps", (*size, "--state", state, "--calibrate-steps")),
        ("calibrated", (*size, "--state", state, "--calibrate")),
        ("again", ("--from-state", state)),
        ("spread", ("--from-state", state, "--spread", "3")),
    ):
        done = invoke(search_cli.main, *common, *more)
        assert done.exit_code == 0, done.output
        plans[name] = read_plan(plan)
    weights = {name: found.provenance["step_weights"] for name, found in plans.items()}
    assert plans["calibrated"].provenance["weights"] == "measured" and weights["calibrated"] != weights["plain"]
    assert [plans[name].provenance["calibrated"] for name in ("steps", "calibrated")] == ["steps", "steps and heads"]
    assert weights["steps"] != weights["plain"]
    assert dumps(plans["again"]) == dumps(plans["calibrated"]) and dumps(plans["spread"]) == dumps(plans["plain"])
