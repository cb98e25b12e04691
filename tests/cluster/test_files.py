"""Tests of Dockerfile, launcher files, SLURM script and compose file: valid, no secrets, no open ports. Mistakes are found."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import compose_spec
import pytest
from manifests import Document, read

from lmu_dist import __version__
from lmu_dist.cli import cli
from lmu_dist.launch.local_commands import HEALTH_CHECK_SETTINGS

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
DOCKERFILE, COMPOSE, SLURM = CLUSTER / "Dockerfile", CLUSTER / "mlflow" / "compose.yaml", CLUSTER / "slurm.sbatch"
LAUNCHER_FILES = [CLUSTER / "ray-up-aws.yaml", CLUSTER / "ray-up-onprem.yaml"]


def lint(tool: str, text: str) -> str:
    """Output of a linter of this virtual environment for a text; empty if it finds nothing."""
    command = [Path(sys.executable).with_name(tool), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=30, check=False).stdout


def validate_launcher(config: Document) -> Document:
    from ray.autoscaler._private.util import prepare_config, validate_config  # seconds of import

    full = prepare_config(config)
    validate_config(full)
    return full


def instructions(kind: str) -> list[str]:
    """The arguments of all instructions of a kind."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE))
    return re.findall(rf"^{kind} (.*)$", text, re.MULTILINE)


def test_dockerfile_passes_its_linter():
    assert lint("hadolint", DOCKERFILE.read_text()) == ""


@pytest.mark.parametrize(
    ("wrong", "code"), [("FROM python", "DL3006"), ("RUN cd /opt && sudo ls", "DL3004"), ("WORKDIR opt", "DL3000")]
)
def test_mistake_in_the_dockerfile_is_found(wrong: str, code: str):
    assert code in lint("hadolint", f"{DOCKERFILE.read_text()}\n{wrong}\n")


def test_image_runs_unprivileged_and_contains_only_allowed_files():
    assert instructions("USER") == ["1000:1000"]
    assert re.search(r"^BASE=\S+:\d+\.\d+\.\d+-\S+$", "\n".join(instructions("ARG")), re.MULTILINE)
    copied = {source.rstrip("/") for line in instructions("COPY") for source in line.split()[:-1]}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    within = {source for source in copied if any(source == a or source.startswith(f"{a}/") for a in allowed)}
    assert within == copied
    assert {a for a in allowed if any(source == a or source.startswith(f"{a}/") for source in copied)} == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_image_has_its_programs_on_path_and_requires_a_token():
    [settings] = instructions("ENV")
    assert "PATH=/opt/venv/bin:$PATH" in settings
    assert 'echo "PATH=/opt/venv/bin:\\$PATH" >/etc/profile.d/' in "".join(instructions("RUN"))
    assert "RAY_AUTH_MODE=token" in settings
    assert all(f"{name}={value}" in settings for name, value in HEALTH_CHECK_SETTINGS.items())


@pytest.mark.parametrize("path", LAUNCHER_FILES, ids=lambda path: path.stem)
def test_launcher_files_are_valid_and_run_no_setup_commands(path: Path):
    full = validate_launcher(*read(path.read_text()))
    assert [full[f"{which}setup_commands"] for which in ("", "head_", "worker_")] == [[], [], []]
    for image in (full["docker"]["image"], full["docker"]["head_image"]):
        assert image.rpartition(":")[2] in (f"{__version__}-cpu", f"{__version__}-cuda")


@pytest.mark.parametrize("path", LAUNCHER_FILES, ids=lambda path: path.stem)
def test_launched_clusters_require_a_token_and_bind_the_dashboard_to_loopback(path: Path):
    [config] = read(path.read_text())
    starts = [c for c in config["head_start_ray_commands"] + config["worker_start_ray_commands"] if "ray start" in c]
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert any("--dashboard-host=127.0.0.1" in command and "--num-cpus=0" in command for command in starts)
    assert not any(re.search(r"AUTH_TOKEN=|PASSWORD|SECRET", command) for command in starts)
    assert config["file_mounts"]["/home/lmu/.ray/auth_token"].startswith("~/")
    rules = config["provider"].get("security_group", {}).get("IpPermissions", [])
    assert not any(r["CidrIp"] == "0.0.0.0/0" for rule in rules for r in rule["IpRanges"])


def test_spot_workers_scale_from_zero():
    types = validate_launcher(*read(LAUNCHER_FILES[0].read_text()))["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert types["gpu"]["min_workers"] == 0 < types["gpu"]["max_workers"]
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


@pytest.mark.parametrize("path", LAUNCHER_FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("section", ["", "docker", "auth"])
def test_mistake_in_a_launcher_file_is_found(path: Path, section: str):
    [config] = read(path.read_text())
    (config[section] if section else config)["imagee"] = "x"
    with pytest.raises(Exception, match="imagee"):
        validate_launcher(config)


def test_slurm_script_passes_its_linter():
    assert lint("shellcheck", SLURM.read_text()) == ""


@pytest.mark.parametrize("wrong", ["cd $HOME/x y", 'if [ "$a" == b ]; then', "echo $undefined_here"])
def test_mistake_in_the_slurm_script_is_found(wrong: str):
    assert lint("shellcheck", f"{SLURM.read_text()}\n{wrong}\n")


def test_slurm_script_hides_its_token_and_runs_a_known_command():
    text = SLURM.read_text()
    assert text.index("umask 077") < text.index('>"$RAY_AUTH_TOKEN_PATH"')
    assert "RAY_AUTH_TOKEN=" not in text
    [line] = re.findall(r"^srun (.*)$", text.replace("\\\n", " "), re.MULTILINE)
    words = shlex.split(line)
    shell, option, script, *_ = words[words.index("--") + 1 :]
    assert (shell, option) == ("bash", "-c")
    program, command, *_ = shlex.split(script)
    assert (program, command in cli.commands) == ("lmu-dist", True)


@pytest.mark.parametrize(
    ("starts", "ladder", "code"),
    [(True, 'echo "$@" >"$HOME/arguments"', 0), (True, "exit 3", 3), (False, "exit 0", 1)],
    ids=["done", "ladder fails", "ray does not start"],
)
def test_slurm_script_succeeds_only_if_the_ladder_does(tmp_path: Path, starts: bool, ladder: str, code: int):
    programs = {
        "scontrol": "echo node-1",
        "srun": 'exec "$@"',
        "ray": 'while [ "$1" != -- ]; do shift; done; shift; "$@"'
        if starts
        else "exit 0",  # runs the command, as symmetric-run does
        "lmu-dist": ladder,
        "python": f'exec {sys.executable} "$@"',
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".lmu-dist").mkdir()
    (tmp_path / ".lmu-dist" / "slurm-7.done").touch()  # left by the same job, killed and requeued
    slurm = {
        "JOB_ID": "7",
        "JOB_NODELIST": "node-[1-2]",
        "JOB_NUM_NODES": "2",
        "CPUS_PER_TASK": "4",
        "SUBMIT_DIR": str(tmp_path),
    }
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment |= {"HOME": str(tmp_path), "LMU_VENV": str(tmp_path), "PATH": os.environ["PATH"]}
    command = ["bash", SLURM, "jobs/paper.yaml", "storage=/a b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == code, done.stderr
    assert not list((tmp_path / ".lmu-dist").iterdir())
    if code == 0:
        assert (tmp_path / "arguments").read_text() == "ladder jobs/paper.yaml storage=/a b cluster.address=node-1:20007\n"


def test_compose_file_is_valid():
    compose_spec.PyCompose.from_yaml(COMPOSE.read_text())


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("restart:", "restrt:"),
        lambda text: text.replace("interval:", "intervall:"),
        lambda text: text.replace("service_healthy", "service_helthy"),
    ],
)
def test_mistake_in_the_compose_file_is_found(change: Callable[[str], str]):
    with pytest.raises(ValueError, match="services"):
        compose_spec.PyCompose.from_yaml(change(COMPOSE.read_text()))


def test_compose_services_bind_to_loopback_and_read_secrets_from_files():
    [compose] = read(COMPOSE.read_text())
    for name, service in compose["services"].items():
        assert service["user"] == "1000:1000", name
        assert service["cap_drop"] == ["ALL"], name
        assert {"cpus", "memory"} == set(service["deploy"]["resources"]["limits"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        secret_keys = {key for key in service["environment"] if re.search("PASSWORD|SECRET", key)}
        assert secret_keys, name
        assert all(key.endswith("_FILE") for key in secret_keys), name
        assert set(service["secrets"]) <= set(compose["secrets"]), name
    readme = (CLUSTER / "README.md").read_text()
    for secret in compose["secrets"].values():
        assert secret["file"].startswith("${HOME}/.lmu-dist/"), (
            "must be outside the repository, so that it is not packed into an image or a job"
        )
        assert Path(secret["file"]).name in readme


def test_compose_postgres_uses_a_subfolder_of_its_volume():
    [compose] = read(COMPOSE.read_text())
    postgres = compose["services"]["postgres"]
    [volume] = postgres["volumes"]
    mounted = Path(volume.partition(":")[2])
    assert mounted in Path(postgres["environment"]["PGDATA"]).parents, "the volume itself belongs to the image's user"


def test_secrets_are_created_once_and_readable_by_their_owner_only(tmp_path: Path):
    [block] = [b for b in re.findall(r"```\n(.*?)```", (CLUSTER / "README.md").read_text(), re.DOTALL) if "umask" in b]
    contents = []
    for _ in range(2):
        command = ["bash", "-c", f"umask 022\n{block}\numask; pwd"]
        environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
        assert done.stdout.split() == ["0022", str(ROOT)]  # umask and folder of the calling shell are unchanged
        contents.append({path.name: path.read_text() for path in (tmp_path / ".lmu-dist").iterdir()})
    assert contents[0] == contents[1]
    assert {name for name, secret in contents[0].items() if len(secret) == 64} == {*contents[0]} - {"mlflow.ini"}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / ".lmu-dist").iterdir()} == {0o600}


def test_files_named_in_the_readme_exist():
    text = (CLUSTER / "README.md").read_text()
    for name in re.findall(r"\]\(([\w./-]+)\)", text) + re.findall(r"(?:cluster|jobs|tests)/[\w/-]+\.\w+", text):
        assert (CLUSTER / name).exists() or (ROOT / name).exists(), name
