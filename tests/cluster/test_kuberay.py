"""cluster/kuberay: valid to the last field, closed to strangers, nothing secret inside, all that it names is there."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from manifests import Document, containers, fault, pods, read, render

from lmu_dist import __version__
from lmu_dist.cli import cli
from lmu_dist.config import load

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
LADDER = KUBERAY / "ladder.yaml"
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY")


@pytest.fixture(params=["dev", "prod"])
def documents(request: pytest.FixtureRequest) -> list[Document]:
    return [*render(KUBERAY / "overlays" / request.param), *read(LADDER.read_text())]


def named(documents: list[Document], kind: str) -> dict[str, Document]:
    return {d["metadata"]["name"]: d for d in documents if d["kind"] == kind}


def test_every_document_is_valid(documents: list[Document]):
    assert {(d["kind"], d["metadata"]["name"]): f for d in documents if (f := fault(d))} == {}
    keys = [(d["kind"], d["metadata"]["name"]) for d in documents]
    assert len(keys) == len(set(keys))
    assert all(d["metadata"].get("namespace") == "lmu" for d in documents if d["kind"] != "Namespace")


@pytest.mark.parametrize("kind", sorted({d["kind"] for d in [*render(KUBERAY / "overlays/dev"), *read(LADDER.read_text())]}))
def test_a_field_that_is_none_is_found(kind: str):
    documents = [*render(KUBERAY / "overlays/dev"), *read(LADDER.read_text())]
    document = next(d for d in documents if d["kind"] == kind)
    (document["data"] if kind == "ConfigMap" else document.get("spec", document))["replica"] = 1
    assert fault(document)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("spec/authOptions/mode", "tokens"),
        ("spec/headGroupSpec/template/spec/containers/0/imagee", "x"),
        ("spec/workerGroupSpecs/0/maxReplicas", "many"),
        ("spec/workerGroupSpecs/0/template/spec/securityContext/runAsNonRot", True),
    ],
)
def test_a_fault_deep_in_a_ray_cluster_is_found(where: str, value: object):
    cluster = named(render(KUBERAY / "overlays/prod"), "RayCluster")["lmu"]
    *path, key = where.split("/")
    node = cluster
    for part in path:
        node = node[int(part)] if part.isdigit() else node[part]
    node[key] = value
    assert fault(cluster)


@pytest.mark.parametrize("line", ["namePrefix: x-", "patches: [{path: raycluster.yaml}]", "kind: Component"])
def test_kustomize_beyond_what_is_rendered_is_refused(line: str, tmp_path: Path):
    header = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: []\n"
    text = header.replace("kind: Kustomization", line) if line.startswith("kind") else header + line
    (tmp_path / "kustomization.yaml").write_text(text)
    with pytest.raises(ValueError, match="not"):
        render(tmp_path)


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_kubectl_renders_the_same(overlay: str):
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl on PATH to compare with")
    folder = KUBERAY / "overlays" / overlay
    theirs = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=True, timeout=60).stdout

    def order(document: Document) -> tuple[str, str]:
        return document["kind"], document["metadata"]["name"]

    assert sorted(read(theirs), key=order) == sorted(render(folder), key=order)


def test_pods_have_no_rights_they_do_not_need(documents: list[Document]):
    for name, pod in pods(documents):
        spec = pod["spec"]
        assert spec.get("serviceAccountName", "lmu") in named(documents, "ServiceAccount"), name
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
    asking = [name for name, pod in pods(documents) if pod["spec"].get("automountServiceAccountToken") is not False]
    assert asking == ["RayCluster lmu"], "the head alone, whose autoscaler asks the Kubernetes API for workers"
    contexts = list(containers(documents))
    contexts.append(("autoscaler", named(documents, "RayCluster")["lmu"]["spec"]["autoscalerOptions"]))
    for name, container in contexts:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}, name
        assert {"cpu", "memory"} <= set(container["resources"]["limits"]), name
        assert not any("hostPort" in port for port in container.get("ports", [])), name


def test_ray_asks_for_a_token_and_runs_drivers_alone_on_the_head(documents: list[Document]):
    spec = named(documents, "RayCluster")["lmu"]["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "lmu-ray"}
    assert spec["rayVersion"] == version("ray")
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["enableInTreeAutoscaling"]
    [workers] = spec["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] < workers["maxReplicas"]


def test_gpu_workers_come_from_nothing():
    [workers] = named(render(KUBERAY / "overlays/prod"), "RayCluster")["lmu"]["spec"]["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["replicas"]) == (0, 0)
    [container] = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_no_secret_is_written_down(documents: list[Document]):
    assert not named(documents, "Secret")
    for name, container in containers(documents):
        for variable in container.get("env", []):
            if SECRET.search(variable["name"]):
                assert set(variable) == {"name", "valueFrom"}, f"{name}: {variable['name']}"
                assert "secretKeyRef" in variable["valueFrom"]
        assert not SECRET.search(" ".join(container.get("args", []))), name
    for data in named(documents, "ConfigMap").values():
        assert not any(SECRET.search(key) for key in data["data"])


def test_what_is_referred_to_is_there_or_told_to_be_made(documents: list[Document]):
    told = (ROOT / "cluster" / "README.md").read_text()
    made = {name: set(re.findall(r"--from-file=([\w-]+)=", line)) for name, line in re.findall(r"generic (\S+) (.*)", told)}
    assert named(documents, "RayCluster")["lmu"]["spec"]["authOptions"]["secretName"] in made
    assert "auth_token" in made["lmu-ray"]  # the key KubeRay looks for
    for name, container in containers(documents):
        for source in container.get("envFrom", []):
            assert source["configMapRef"]["name"] in named(documents, "ConfigMap"), name
        for variable in container.get("env", []):
            if "valueFrom" in variable:
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["key"] in made[reference["name"]], name


def test_services_and_policies_find_their_pods(documents: list[Document]):
    labels = [pod.get("metadata", {}).get("labels", {}) for _, pod in pods(documents)]
    labels += [{"ray.io/cluster": "lmu", "ray.io/node-type": kind} for kind in ("head", "worker")]  # KubeRay's own

    def found(wanted: Document) -> bool:
        return any(wanted.items() <= have.items() for have in labels)

    assert all(found(service["spec"]["selector"]) for service in named(documents, "Service").values())
    assert all(found(b["spec"]["selector"]["matchLabels"]) for b in named(documents, "PodDisruptionBudget").values())
    policies = named(documents, "NetworkPolicy")
    assert policies["nobody"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, policy in policies.items():
        assert found(policy["spec"]["podSelector"].get("matchLabels", {})), name
        for rule in policy["spec"].get("ingress", []):
            assert rule["from"], f"{name} lets everybody in"
            for peer in rule["from"]:
                if "namespaceSelector" not in peer and "matchLabels" in peer["podSelector"]:
                    assert found(peer["podSelector"]["matchLabels"]), name
    hosts = [v["value"] for _, c in containers(documents) for v in c.get("env", []) if v["name"] == "PGHOST"]
    assert set(hosts) <= set(named(documents, "Service"))


def test_mlflow_answers_to_the_names_it_is_called_by(documents: list[Document]):
    [container] = named(documents, "Deployment")["mlflow"]["spec"]["template"]["spec"]["containers"]
    [hosts] = [arg.partition("=")[2].split(",") for arg in container["args"] if arg.startswith("--allowed-hosts=")]
    assert set(hosts) == {"mlflow:5000", "localhost:5000", "127.0.0.1:5000"}  # in the cluster; through port-forward


def test_images_are_pinned_to_this_version(documents: list[Document]):
    for name, container in containers(documents):
        image, _, tag = container["image"].rpartition(":")
        assert image, f"{name}: {container['image']} has no tag"
        assert tag != "latest", name
        if image.endswith("/lmu-dist"):
            assert tag in (f"{__version__}-cpu", f"{__version__}-cuda"), name


def test_the_job_names_a_command_and_a_configuration():
    [job] = read(LADDER.read_text())
    clusters = named(render(KUBERAY / "overlays/prod"), "RayCluster")
    assert job["spec"]["clusterSelector"]["ray.io/cluster"] in clusters
    program, command, path, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (program, command in cli.commands) == ("lmu-dist", True)
    home = re.findall(r"^WORKDIR (\S+)", (ROOT / "cluster" / "Dockerfile").read_text(), re.MULTILINE)[0]
    assert load(ROOT / Path(path).relative_to(home)).ladder
    storage = named(render(KUBERAY / "overlays/prod"), "ConfigMap")["lmu-storage"]["data"]
    assert load(ROOT / Path(path).relative_to(home), overrides).cluster.wait_seconds > 0  # GPU workers come when asked for
    assert "LMU_DIST_HOME" in storage


def plant(change: Callable[[Document], None]) -> list[Document]:
    documents = [*render(KUBERAY / "overlays/prod"), *read(LADDER.read_text())]
    change(named(documents, "Deployment")["mlflow"]["spec"]["template"]["spec"]["containers"][0])
    return documents


def test_a_password_written_down_is_found():
    documents = plant(lambda c: c["env"].append({"name": "PGPASSWORD", "value": "hunter2"}))
    with pytest.raises(AssertionError, match="PGPASSWORD"):
        test_no_secret_is_written_down(documents)


def test_a_container_without_limits_is_found():
    with pytest.raises((AssertionError, KeyError)):
        test_pods_have_no_rights_they_do_not_need(plant(lambda c: c["resources"].pop("limits")))
