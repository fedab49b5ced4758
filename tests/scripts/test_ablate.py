"""scripts/ablate.py BUILD/train: with a stand-in for a GPU's ./train, what it asks for and in which order, what it
makes of the answers, that it goes on where it was broken off; with the real one, the demo on the CPU."""
import csv
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ABLATE = ROOT / "scripts" / "ablate.py"
SVG = "{http://www.w3.org/2000/svg}"

# Everything takes 100 ms a step; each flag makes it longer, each run 1% longer than the one before. keep needs 10 GB,
# recompute 4; a token more than 1000 takes 0.005 GB more. It is started by the interpreter itself, which a `python3` of
# PATH may take far longer to find.
TRAIN = f"#!{sys.executable} -IS\n" + '''
import json, sys, time
from pathlib import Path
a = sys.argv[1:]
top, run = Path(__file__).parent, Path(a[a.index("--run-dir") + 1])
last = lambda flag, other: a[len(a) - a[::-1].index(flag)] if flag in a else other
sets = dict(x.split("=", 1) for x in a if "=" in x)
if sets.get("kernels.moe_gemm") == "?":
    sys.exit('error: kernels.moe_gemm = "?": must be one of modality|grouped|loop')
budget, policy = float(sets.get("memory.budget_gb", 1e6)), last("--memory", "auto")
T = last("--tokens", 1000)
T = {"recompute": 2200, "auto": 2400}[policy] if T == "max" else int(T)
need = {"keep": 10, "recompute": 4, "offload": 3, "auto": min(max(budget, 3), 10)}[policy] + 0.005 * (T - 1000)
if "--plan" in a:
    print(f"parameters 1 M, slots {T}, modulation rows 9, micro-batches 1, policy x")
    print(f"  total {need * 10**9:.0f} bytes {need * 1e3} MB")
    sys.exit()
calls = (top / "calls").read_text().splitlines()
name = " ".join(a[len(a) - a[::-1].index("eval.samples=0"):]).replace("--steps 100000", "").strip()
(top / "calls").write_text("\\n".join([*calls, name]) + "\\n")
if policy == "offload":
    sys.exit("error: no more memory")
slow = {"unfused": 20, "loop": 50, "recompute": 25, "padded": 0, "grouped": 4, "off": 6, "single": 10,
        "kernels.pdl=off": 8, "kernels.update=overlapped": -6}
ms = (100 + sum(slow.get(word, 0) for word in a) + (8 if policy == "auto" and budget == 4 else 0)) * T / 1000
ms *= 1.01 ** len(calls)
run.mkdir(parents=True, exist_ok=True)
sys.stderr.write("data: 50 samples with 50 images, about 1k tokens; held out: 0 samples\\n"
                 f"device memory: planned 1.5 GB, in use {need:.3f} GB (+0.20%)\\n")
sys.stderr.flush()
wrong = 0.1 if (top / "wrong").exists() and "off" in a else 0
loss = 5 + 1e-4 * ("loop" in a) + ("padded" in a) + wrong
with open(run / "metrics.jsonl", "w") as f:
    for step in range(40):
        f.write(json.dumps({"step": step, "tokens": T * (0.8 if "padded" in a else 1), "fill": 1.0, "loss": loss,
                            "flow": 1 + 1e-5 * ("padded" in a), "ce": 2.0, "mfu": 0.4, "expert_load_max": 1.5,
                            "seconds": ms / 1e3 * (9 if step < 6 else 2 if step % 10 == 9 else 1)}) + "\\n")
    f.flush()
    time.sleep(60)
'''
CONFIG = {"model": {"patch": 8, "text": {"experts": 4, "top_k": 2}, "image": {"experts": 8, "top_k": 1}},
          "data": {"image_size": 16, "max_caption": 12, "sources": ["mine"]}, "train": {"ema_every": 10}}  # fmt: skip


def ablate(*arguments, code=0):
    done = subprocess.run([sys.executable, ABLATE, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr, (arguments, done)
    return done.stdout + done.stderr


def rows_of(out):
    with open(out / "ablate.csv", newline="") as f:
        return list(csv.DictReader(f))


def stand_in(top):
    config, train, out = top / "some.json", top / "train", top / "out"
    config.write_text("// a model\n" + json.dumps(CONFIG))
    train.write_text(TRAIN)
    train.chmod(0o755)
    (top / "calls").write_text("")
    common = [out, "--device", "cuda", "--train", train, "--tokens", "1000", "--seconds", "0.5"]

    ablate(*common, "--models", config, "--parts", "switches", "--repeats", "2")
    calls = (top / "calls").read_text().splitlines()
    same, rounds = calls[:2], calls[2:]
    assert same == ["--set data.max_images=50", "--packing padded --set data.max_images=50"], same
    assert len(rounds) == 18 and rounds[:9] == rounds[9:][::-1], rounds
    assert rounds[:3] == ["", "--adaln unfused", "--moe-gemm loop"], rounds[:3]
    found = json.loads((out / "ablate.json").read_text())
    gains = {g["technique"]: g for g in found["gains"]}
    for technique, slower in (("AdaLN in one kernel", 1.2), ("grouped GEMM", 1.5), ("varlen packing", 1.25),
                              ("tiles by modality", 1.04), ("captured graphs", 1.06), ("grouped GEMM, even loads", 1.5)):  # fmt: skip
        g = gains[technique]
        assert g["rounds"] == 2 and g["least"] + 1 < 100 * (slower - 1) < g["largest"] - 0.9, g
        assert abs(g["gain"] - 100 * (slower - 1)) < 0.5, g  # what drifts in a round, the next takes back
    assert gains["captured graphs"]["losses"] == gains["keep instead of recompute"]["losses"] == "the same digits"
    assert gains["grouped GEMM"]["losses"] == "2e-05", gains["grouped GEMM"]
    assert gains["varlen packing"]["losses"] == "1e-05 on the same documents", gains["varlen packing"]
    assert gains["even loads"]["losses"] == "other experts" and abs(gains["even loads"]["gain"]) < 0.5, gains
    run = found["runs"][2]
    assert run["variant"] == "everything" and run["memory_gb"] == 10 and run["mfu"] == 0.3636, run
    # its two runs drifted by 2% and 21%; the EMA's update, every tenth step, takes another 100 ms
    assert abs(run["step_ms"] / (110 * 1.114) - 1) < 0.01, run
    # 20 tokens a sample, 4 of them an image's: a fifth of 1000 tokens on 8 experts, and two choices each of the others
    assert (run["text_rows"], run["image_rows"], run["load_max"]) == (400, 25, 1.5), run

    # Broken off: what is missing is measured, what is there is not.
    lines = (out / "ablate.csv").read_text().splitlines(keepends=True)
    (out / "ablate.csv").write_text("".join(line for line in lines if "no graphs,1" not in line))
    (top / "calls").write_text("")
    ablate(*common, "--models", config, "--parts", "switches", "--repeats", "2")
    assert (top / "calls").read_text().splitlines() == ["--graph off"]
    said = ablate(*common, "--models", config, "--parts", "memory", "--minutes", "1e-9")
    assert "goes on" in said and (top / "calls").read_text().count("\n") == 1, said

    said = ablate(*common, "--models", config, "--parts", "memory", "ladder", "batch", "step", "--repeats",
                  "1")  # fmt: skip
    calls = (top / "calls").read_text().splitlines()[1:]
    tight, grouped = "--set memory.budget_gb=4.000", "--adaln unfused --packing padded"
    assert calls[:3] == ["--memory recompute", tight, f"{tight} --streams single"], calls
    assert calls[3:5] == [f"{tight} --set memory.share_gradients=false", "--set memory.budget_gb=7.000"], calls
    at = next(i for i, call in enumerate(calls) if "loop" in call)
    assert calls[at:at + 5] == [f"--memory recompute --moe-gemm loop {grouped}", f"{tight} --moe-gemm loop {grouped}",
                                f"{tight} {grouped}", tight, ""], calls  # fmt: skip
    keep = "--set memory.budget_gb=10.000"
    assert calls[-8:] == [f"--memory keep {keep}", f"{keep} --tokens 2000", f"--memory recompute {keep} --tokens 2000",
                          f"--memory recompute {keep} --tokens 2200", f"{keep} --tokens 2400",
                          "", "--set kernels.pdl=off", "--set kernels.update=overlapped"], calls  # fmt: skip
    gains = {g["technique"]: g["gain"] for g in json.loads((out / "ablate.json").read_text())["gains"]}
    assert gains["launches that overlap"] > 6 and gains["update in the forward pass"] > 3, gains
    assert "error: no more memory" in (out / "ablate.txt").read_text(), said
    for name, circles in (("switches", 1 + 8), ("memory", 1 + 4), ("ladder", 1 + 5)):
        root = xml.parse(out / f"{name}-cuda.svg").getroot()
        assert len(list(root.iter(f"{SVG}circle"))) == circles, name

    page = top / "page.md"
    places = ("<!-- ablate cuda switches -->\nold\n<!-- end -->\n", "<!-- ablate cpu switches -->\nkept\n<!-- end -->\n")
    page.write_text("a\n" + "b\n".join(places))
    ablate(out, "--markdown", page)
    text = page.read_text()
    assert "| grouped GEMM | +" in text and "old" not in text and text.endswith("b\n" + places[1]), text
    assert "![" not in text  # there is no folder for its chart
    said = ablate(out, "--markdown")
    assert "| grouped GEMM | +20% | +5" in said and "| largest batch in keep's memory, planned | batch x 2 | x 2.4 |" in said, said
    (top / "docs" / "figures").mkdir(parents=True)
    page.write_text("<!-- ablate cuda chart -->\nold\n<!-- end -->\n")
    ablate(out, "--markdown", page)
    chart = "docs/figures/switches-cuda.svg"
    assert f"({chart})" in page.read_text() and "old" not in page.read_text(), page.read_text()
    assert (top / chart).read_text() == (out / "switches-cuda.svg").read_text()
    # What failed is not there as if it were measured; without anything measured that is an error.
    assert not any(row["variant"] == "offload" for row in rows_of(out)), said
    offload = [*common, "--models", config, "--parts", "memory", "--repeats", "1", "--variants", "offload"]
    said = ablate(*offload, code=1)
    assert "the last run said: error: no more memory" in said and "out/log" in said, said
    train.write_text(TRAIN.replace("error: no more memory", "error: less memory"))
    assert "the last run said: error: less memory" in ablate(*offload, code=1)
    train.write_text(TRAIN.replace('if policy == "offload"', "if False"))
    ablate(*offload)
    assert [row["note"] for row in rows_of(out) if row["variant"] == "offload"] == [""], rows_of(out)
    train.write_text(TRAIN)
    (top / "wrong").write_text("")
    said = ablate(top / "worse", *common[1:], "--models", config, "--repeats", "1", "--parts", "switches", code=1)
    assert said.strip().endswith("same losses: some: captured graphs"), said
    # After a first round of everything, the part goes on that has had the least time.
    (top / "calls").write_text("")
    ablate(top / "turns", *common[1:], "--models", config, "--parts", "switches", "memory", "--repeats", "2", "--variants",
           "everything", "AdaLN unfused", "recompute")  # fmt: skip
    first = ["", "--adaln unfused", "--memory recompute"]
    assert (top / "calls").read_text().splitlines() == [*first, first[2], first[2], *first[::-1]]
    assert all(float(row["seconds"]) > 0 for row in rows_of(top / "turns"))
    # Rows of other settings stay apart; where nothing was measured, settings bind nobody.
    for more, differs in ((["--set", "train.lr=1"], "--set: none then, train.lr=1 now"),
                          (["--tokens", "2000"], "--tokens: 1000 then, 2000 now"),
                          (["--init", top], f"--init: none then, {top} now")):  # fmt: skip
        said = ablate(*common, "--models", config, *more, code=1)
        assert differs in said and said.count(" then, ") == 1 and "another OUT" in said, said
    alone = [top / "alone", *common[1:], "--models", config, "--parts", "memory", "--repeats", "1", "--variants", "recompute"]
    train.write_text(TRAIN.replace('if policy == "offload"', 'if "--init" in a'))
    ablate(*alone, "--init", top, code=1)
    ablate(*alone)
    assert "--init: none then" in ablate(*alone, "--init", top, code=1)
    learned = [top / "learned", *alone[1:]]
    train.write_text(TRAIN)
    ablate(*learned, "--init", top)
    said = ablate(top / "learned", "--markdown")
    assert "<!-- ablate cuda memory learned -->" in said and "claims" not in said, said  # one run is no comparison
    (top / "alone" / "ablate.settings.json").write_text("{}")
    assert "ablate.settings.json is not whole" in ablate(*alone, code=1)
    train.write_text(TRAIN)
    # Bad input.
    (top / "file").write_text("")
    for what, *arguments in (("file", top / "file"), ("--repeats", out, "--repeats", "0"),
                             ("nowhere", out, "--data", "nowhere"), ("--minutes", out, "--minutes", "nan"), ("nothing", out, "--train", "nothing"),
                             ("no config", out, "--models", "huge", "--train", train),
                             ("measure first", top / "new", "--markdown"),
                             ("variant", *common, "--models", config, "--variants", "nothing at all"),
                             ("no place", out, "--markdown", config)):  # fmt: skip
        command = [sys.executable, ABLATE, "--train", train, *map(str, arguments)]  # a later --train wins
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode in (1, 2) and what in done.stderr and "Traceback" not in done.stderr, (what, done.stderr)


def claims():
    """A batch has as many slots as its tokens fill."""
    sys.path.insert(0, str(ABLATE.parent))
    import ablate_report

    run = lambda variant, tokens, fill: {"device": "cuda", "part": "batch", "variant": variant, "model": "m", "tokens": tokens,
                                         "fill": fill}  # fmt: skip
    found = {"gains": [{"device": "cuda", "technique": "grouped GEMM", "model": "m", "gain": 20}],
             "runs": [run("T, keep", 500, 0.5), run("most, planned", 1800, 0.9)]}  # fmt: skip
    assert ablate_report.claims_table(found, "cuda")[1:] == [
        ["grouped GEMM", "+20%", "+20.0%"], ["largest batch in keep's memory, planned", "batch x 2", "x 2.0"]]  # fmt: skip


def demo(top, train):
    """The three ways of memory train to the same bits, and padding to the same losses of the same documents."""
    said = ablate(top, "--device", "cpu", "--train", train, "--tokens", "512", "--seconds", "0.01", "--repeats", "1",
                  "--parts", "switches", "memory", "--variants", "everything", "padded", "recompute", "planned, tight", "offload")  # fmt: skip
    rows = {(r["part"], r["variant"]): r for r in rows_of(top)}
    assert len(rows) == 8 and all(r["tokens_per_second"] and r["memory_gb"] for r in rows.values()), rows
    assert len({r["loss"] for (part, v), r in rows.items() if part != "same documents" and v != "padded"}) == 1, rows
    same = [r["first_losses"] for (part, _), r in rows.items() if part == "same documents"]
    assert all(abs(float(a) / float(b) - 1) < 1e-5 for a, b in zip(same[0].split(), same[1].split())), same
    assert "only a GPU shows" in said, said


with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "stand-in").mkdir()
    stand_in(Path(folder) / "stand-in")
    claims()
    demo(Path(folder) / "demo", Path(sys.argv[1]).resolve())
print("ablations: measured in turns, compared, continued, drawn, refused")
