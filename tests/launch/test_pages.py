"""Every command on the pages about where a run takes place is one that would be understood."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from composing import composed
from pages import DOCS, text_of
from ray.scripts import scripts as ray_scripts

from rlsys.config.build import build
from rlsys.config.compose import overridden_keys
from rlsys.config.ignored import refuse_ignored

ROOT = DOCS.parent
PAGES = [f"how-to/{name}.md" for name in ("slurm", "kubernetes", "laptop", "docker")]
LAUNCH = ["python", "-m", "rlsys.launch"]
SBATCH = re.compile(r"--(nodes=\d+|gpus-per-node=\d+|segment=\d+|time=\d\d:\d\d:\d\d)")


def lines(page: str) -> list[str]:
    """Indented lines: what the user is to type."""
    return [line.strip() for line in text_of(page).splitlines() if line.startswith("    ")]


COMMANDS = [(page, line) for page in PAGES for line in lines(page)]


def launches(overrides: Sequence[str]) -> None:
    (recipe,) = (word.removeprefix("+recipe=") for word in overrides if word.startswith("+recipe="))
    others = [word for word in overrides if not word.startswith("+recipe=")]
    refuse_ignored(build(composed(*others, recipe=recipe)), overridden_keys(others))


def make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(words) <= set(targets)


def ray(words: list[str]) -> None:
    command = {"start": ray_scripts.start, "stop": ray_scripts.stop}[words[0]]
    command.make_context(words[0], words[1:])  # knows its options, and says so


def sbatch(words: list[str]) -> None:
    options = [word for word in words if word.startswith("--")]
    script, *overrides = words[len(options) :]
    assert all(SBATCH.fullmatch(option) for option in options), options
    assert (ROOT / script).is_file()
    launches(overrides)


def scancel(words: list[str]) -> None:
    assert words == ["--batch", "--signal=TERM", "JOB"]
    text = (ROOT / "launch" / "slurm" / "rlsys.sbatch").read_text(encoding="utf-8")
    assert re.search(r"^trap '.*stop.*' TERM$", text, re.MULTILINE)


def docker(words: list[str]) -> None:
    if words[0] == "compose":
        option, file, verb, *rest = words[1:]
        services = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))["services"]
        assert option == "--file"
        assert (verb, rest) in [("up", ["--detach", "--wait"]), ("down", [])] or verb == "exec"
        if verb == "exec":
            assert rest[0] in services
            assert rest[1:4] == LAUNCH
            launches(rest[4:])
    elif words[0] == "build":
        file, tag = words[words.index("--file") + 1], words[words.index("--tag") + 1]
        assert (ROOT / file).is_file()
        assert tag == f"rlsys:{file.rpartition('Dockerfile.')[2]}"
        assert words[-1] == "."
    else:
        assert words[0] == "run"
        at = words.index("python")
        assert (ROOT / "docker" / f"Dockerfile.{words[at - 1].removeprefix('rlsys:')}").is_file()
        assert words[at : at + 3] == LAUNCH
        launches(words[at + 3 :])


def kubectl(words: list[str]) -> None:
    manifests = ROOT / "launch" / "kuberay"

    def named(file: str) -> set[tuple[str, str]]:
        loaded = yaml.safe_load_all((manifests / file).read_text(encoding="utf-8"))
        return {(each["kind"].lower(), each["metadata"]["name"]) for each in loaded}

    if words[0] == "apply":
        assert words[1] == "--kustomize"
        assert (ROOT / words[2] / "kustomization.yaml").is_file()
        return
    option, namespace, verb, *rest = words
    assert (option, ("namespace", namespace)) == ("--namespace", *named("namespace.yaml"))
    if verb == "apply":
        assert rest[0] == "--filename"
        assert (ROOT / rest[1]).is_file()
    elif verb == "wait":
        assert rest[0] == "--for=condition=HeadPodReady"
        assert tuple(rest[1].split("/")) in named("raycluster.yaml")
    elif verb == "exec":
        at = rest.index("--")
        ((_, cluster),) = named("raycluster.yaml")
        assert rest[:at] == ["-it", f"service/{cluster}-head-svc"]
        assert rest[at + 1 : at + 4] == LAUNCH
        launches(rest[at + 4 :])
    elif verb == "logs":
        ((_, job),) = named("rayjob.yaml")
        assert rest == ["--follow", f"job/{job}"]
    else:
        assert [verb, *rest[:2]] == ["create", "secret", "generic"]
        key = rest[3].removeprefix("--from-file=").partition("=")[0]
        assert f"name: {rest[2]}\n                    key: {key}\n" in (manifests / "raycluster.yaml").read_text(
            "utf-8"
        )


def python(words: list[str]) -> None:
    assert ["python", *words[:2]] == LAUNCH
    launches(words[2:])


def sudo(words: list[str]) -> None:
    if words[0] == "chown":
        return token_file(" ".join(words))
    assert words == ["docker/check.sh"]
    assert (ROOT / words[0]).stat().st_mode & 0o100
    return None


def token_file(line: str) -> None:
    """As the compose file's own heading has it."""
    told = (ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8").partition("\nname:")[0]
    assert " ".join(line.split()) in " ".join(told.replace("#", " ").split())


UNDERSTOOD: dict[str, Callable[[list[str]], None]] = {
    each.__name__: each for each in (make, python, ray, sbatch, scancel, docker, kubectl, sudo)
}


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_command_would_be_understood(page: str, line: str) -> None:
    if line.startswith("head -c"):
        token_file(line)
        return
    program, *words = shlex.split(line)
    UNDERSTOOD[program](words)


def test_every_page_has_commands_and_its_links_lead_somewhere() -> None:
    assert {page for page, _ in COMMANDS} == set(PAGES)
    for page in PAGES:
        for link in re.findall(r"\]\(([\w./-]+\.md)", text_of(page)):
            assert ((DOCS / page).parent / link).is_file(), f"{page} links to {link}"


def test_the_segments_on_the_page_are_those_in_the_script() -> None:
    script = Path(ROOT / "launch" / "slurm" / "rlsys.sbatch").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+|fewer).* \| `--segment=(\d+)` \|$", text_of("how-to/slurm.md"), re.MULTILINE)
    assert rows == [("128", "16"), ("32", "4"), ("fewer", "1")]
    told = " ".join(script.replace("#", " ").split())
    assert "--segment=16 from 32 nodes of 4 GPUs on, --segment=4 from 8 on, --segment=1 below" in told
