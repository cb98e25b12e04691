"""What Kubernetes would make of cluster/kuberay: a folder of kustomize in, documents or their faults out. For test_kuberay.

Renders the part of kustomize that cluster/ uses (resources, JSON patches from files, images) and refuses all else, so that no
feature can be misread in silence; where there is a kubectl a test compares the two.
"""

import gzip
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonpatch
import jsonschema
import kubernetes_validate
import yaml

Document = dict[str, Any]

KUBERNETES = "1.34"
SCHEMAS = Path(__file__).parent / "schemas"
RAY_KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs"}
HEADER = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}


def read(text: str) -> list[Any]:
    """The documents of a YAML text, aliases as copies of their own; YAML 1.1, as Kubernetes and Ray read it."""
    return [json.loads(json.dumps(document)) for document in yaml.load_all(text, yaml.CSafeLoader)]


def render(folder: Path) -> list[Document]:
    """All documents of a kustomization. Raises ValueError for what this renderer does not know."""
    [kustomization] = read((folder / "kustomization.yaml").read_text())
    header = {key: kustomization.pop(key, None) for key in HEADER}
    if header != HEADER or (unknown := set(kustomization) - {"resources", "patches", "images"}):
        raise ValueError(f"{folder}: {unknown if header == HEADER else header} is not known here")
    documents = []
    for name in kustomization["resources"]:
        path = folder / name
        documents += render(path) if path.is_dir() else read(path.read_text())
    for patch in kustomization.get("patches", []):
        documents = _patch(documents, folder, patch)
    for image in kustomization.get("images", []):
        _set_image(documents, **image)
    return documents


def _patch(documents: list[Document], folder: Path, patch: Document) -> list[Document]:
    if set(patch) != {"path", "target"} or set(patch["target"]) != {"kind", "name"}:
        raise ValueError(f"{folder}: a patch has a path and a target of kind and name, not {patch}")
    [operations] = read((folder / patch["path"]).read_text())
    wanted = (patch["target"]["kind"], patch["target"]["name"])
    if wanted not in {(d["kind"], d["metadata"]["name"]) for d in documents}:
        raise ValueError(f"{folder}: nothing to patch is called {wanted}")
    return [jsonpatch.apply_patch(d, operations) if (d["kind"], d["metadata"]["name"]) == wanted else d for d in documents]


def _set_image(documents: list[Document], name: str, newName: str, newTag: str) -> None:  # noqa: N803
    for _, container in containers(documents):
        if container["image"] == name:
            container["image"] = f"{newName}:{newTag}"


def pods(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Every pod template, with the kind and name of what it belongs to."""
    for document in documents:
        spec, name = document.get("spec", {}), f"{document['kind']} {document['metadata']['name']}"
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]] if document["kind"] == "RayCluster" else [spec]
        for group in groups:
            if "template" in group:
                yield name, group["template"]


def containers(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Every container of every pod, with the kind and name of what it belongs to."""
    for name, pod in pods(documents):
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            yield name, container


def fault(document: Document) -> str | None:
    """What the schema of a document's kind objects to; unknown fields are faults. None: nothing."""
    if document["apiVersion"] == "ray.io/v1":
        return next((error.message for error in _ray_validator(document["kind"]).iter_errors(document)), None)
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as e:
        return e.message
    return None


@cache
def _ray_validator(kind: str) -> jsonschema.Draft202012Validator:
    [definition] = read(gzip.decompress((SCHEMAS / f"{RAY_KINDS[kind]}.crd.yaml.gz").read_bytes()).decode())
    [version] = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema = _closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object", "required": ["name", "namespace"]}  # left open by every definition
    return jsonschema.Draft202012Validator(schema)


def _closed(schema: Any) -> Any:
    """The schema with objects that have no field but those it names, and Kubernetes' own words in those of JSON schema."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        closed["type"] = ["integer", "string"]
    if (
        isinstance(schema.get("properties"), dict)
        and "type" in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        closed.setdefault("additionalProperties", False)
    return closed
