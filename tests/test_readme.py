"""The README tells the truth: its commands exist, its tree is the tree, its figures are those that were measured."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from typer.testing import CliRunner

from labs.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.M))
    used = set(re.findall(r"make ([a-z-]+)", README)) - {"is", "sure"}
    assert used and used <= targets, used - targets
    for target in sorted(used):
        dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert dry.returncode == 0, dry.stderr


def test_every_llmlab_command_exists() -> None:
    for command in set(re.findall(r"`llmlab ([a-z]+(?: [a-z][a-z-]*)?)", README)):
        assert CliRunner().invoke(app, [*command.split(), "--help"]).exit_code == 0, command


def test_the_tree_names_every_folder() -> None:
    shown, top = set(), ""
    for indent, name in re.findall(r"^    (  )?([a-z]+)/ +\S", README.split("<!-- tree -->")[1], re.M):
        top = top if indent else name
        shown.add(f"{top}/{name}" if indent else name)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    folders = {"/".join(Path(p).parts[:depth]) for p in tracked for depth in (1, 2) if len(Path(p).parts) > depth}
    labs = {f"labs/{p.parent.name}" for p in (ROOT / "labs").glob("*/lab.yaml")}  # `llmlab labs` lists them
    expected = {f for f in folders if not f.startswith((".ci", "tests/"))} - labs
    assert shown == expected


def test_the_table_shows_what_was_measured() -> None:
    figures = json.loads((ROOT / "labs" / "measured" / "lora.json").read_text(encoding="utf-8"))
    table = README.split("<!-- labs/measured/lora.json -->")[1].split("## ")[0]
    for key in ("f1_base", "f1_tuned", "f1_closed_book", "exact_match_tuned", "citation_accuracy", "abstention_f1"):
        assert f"{figures[key]:.2f}" in table, key
    assert f"{figures['f1_tuned'] / figures['f1_base']:.1f} times" in table
    assert f"{figures['f1_tuned'] / figures['f1_closed_book']:.0f} times" in table
    assert f"{figures['test_questions']} questions" in table
    assert figures["f1_tuned"] >= 3 * figures["f1_base"]
    assert figures["f1_tuned"] >= 5 * figures["f1_closed_book"]
    assert figures["abstention_f1"] >= 0.7


def test_the_comparison_of_trainers_shows_what_was_measured() -> None:
    figures = json.loads((ROOT / "labs" / "measured" / "tune.json").read_text(encoding="utf-8"))
    table = README.split("<!-- labs/measured/tune.json -->")[1].split("\n**")[0]
    for name, speed in figures["examples_per_second"].items():
        if name in figures["peak_rss_bytes"] and name != "ours_short":
            assert f"| {speed:.2f} | {figures['peak_rss_bytes'][name] / 1e9:.1f} GB |" in table, name
    for key in ("ratio_to_trl_default", "ratio_to_trl_tuned"):
        assert f"{figures[key]:.0f} times" in table, key
    assert figures["ratio_to_trl_default"] >= 5 and figures["ratio_to_trl_tuned"] >= 2 and figures["peak_rss_ratio"] <= 0.5


SEARCHES = ("bm25", "dense", "hybrid", "rerank")


def test_the_comparison_of_searches_shows_what_was_measured() -> None:
    figures = json.loads((ROOT / "labs" / "measured" / "rag.json").read_text(encoding="utf-8"))
    table = README.split("<!-- labs/measured/rag.json -->")[1].split("\n**")[0]
    for name, by_method in figures["recall"].items():
        shown = " | ".join(f"{by_method[method]['recall_at_1']:.2f}" if method in by_method else "-" for method in SEARCHES)
        assert f"| {shown} |" in table, name
    assert figures["hybrid_worst_gap"] <= 0.005
    for option, of in figures["options"].items():
        shown = " | ".join(f"{of[column]:.2f}" for column in ("recall_at_1", "answer_shown", "both_among_4"))
        assert re.search(rf"\| `?{re.escape(option)}`? \| {re.escape(shown)} \| \d+ \|", table), option
    for count, by_kind in figures["ann"].items():
        for kind, of in by_kind.items():
            assert of["recall_at_10"] >= 0.98 and of["speed_ratio_to_flat"] >= 5, (count, kind)
            assert f"| {int(count):,} | {kind} | {of['recall_at_10']:.3f} | {of['speed_ratio_to_flat']:.0f} |" in README, (
                count,
                kind,
            )


def test_the_answers_show_what_was_measured() -> None:
    figures = json.loads((ROOT / "labs" / "measured" / "answers.json").read_text(encoding="utf-8"))
    table = README.split("<!-- labs/measured/answers.json -->")[1].split("\n**")[0]
    base, tuned = figures["base"], figures["tuned"]
    assert f"| {figures['questions']} questions, {figures['unanswerable']} of them asked again without their paragraph |" in table
    for key in base.keys() - {"counts"}:
        shown = ["none" if share is None else f"{share:.2f}" for share in (base[key], tuned[key])]
        assert f"| {' | '.join(shown)} |" in table, key
    for part in ("abstained_unanswerable", "abstained_answerable"):
        shown = [f"{by['retrieval']} + {by['model']}" for by in (base["counts"][part], tuned["counts"][part])]
        assert f"| {' | '.join(shown)} |" in table, part


SERVERS = {
    "engine": "llama.cpp, the engine itself",
    "gateway": "the gateway before it",
    "transformers_serve": "`transformers serve`",
    "vllm": "vLLM on the CPU",
}


def test_the_comparison_of_servers_shows_what_was_measured() -> None:
    found = json.loads((ROOT / "labs" / "measured" / "serve.json").read_text(encoding="utf-8"))
    part = README.split("<!-- labs/measured/serve.json -->")[1].split("\n**")[0]
    assert found["command"] == "llmlab bench serve" and not found["left_out"]
    for name, of in found["tokens_per_second"].items():
        shown = " | ".join(f"{of[streams]:.1f}" for streams in ("1", "8", "32"))
        assert f"| {SERVERS[name]} | {shown} |" in part, name
    assert found["tokens_ratio_to_engine"] >= 0.97 and f"{100 * found['tokens_ratio_to_engine']:.0f} % of the engine's" in part
    assert f"{found['ratio_to_transformers_serve']:.1f} times as fast as `transformers serve`" in part
    ahead = found["tokens_per_second"]["vllm"]["32"] > found["tokens_per_second"]["gateway"]["32"]
    assert ahead == ("vLLM is ahead at 32 streams" in " ".join(part.split()))
    assert found["ttft_added_seconds"] <= 0.005 and f"adds {1000 * found['ttft_added_seconds']:.0f} ms" in part
    assert found["warm_ttft_ratio"] <= 1 / 8 and f"after {100 * found['warm_ttft_ratio']:.0f} % of" in part
    assert found["overload_p99_ratio"] <= 1.5 and f"is {found['overload_p99_ratio']:.1f} times that" in part
    assert found["refused_seconds_p99"] < 0.05 and f"within {1000 * found['refused_seconds_p99']:.0f} ms" in part
    assert not found["server_errors"] and not any(found["leaked"].values()) and found["mixed"]["requests"] == 10_000
    assert found["memory_drift"] < 0.02 and f"{100 * found['memory_drift']:.1f} % more memory" in part
    assert f"{found['speculation_ratio']:.1f} times the speed" in part
    assert f"{100 * found['speculation_equal_replies']:.0f} % of the replies" in part


def test_pictures_exist_and_the_output_shows_an_answer_and_an_abstention() -> None:
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).read_bytes().startswith(b"\x89PNG"), picture
    output = README.split("```text")[1].split("```")[0]
    assert "[1]" in output and "The passages do not answer this question." in output


def test_the_makefile_is_thin() -> None:
    for target, recipe in re.findall(r"^([a-z-]+):.*\n((?:\t.*\n)+)", MAKEFILE, re.M):
        assert len(recipe.splitlines()) <= 3, target
