"""Renders and validates kustomize folders, for test_kuberay: a folder in, Kubernetes documents or schema errors out.

It supports the part of kustomize that cluster/ uses (resources, JSON patches from files, images) and rejects everything else,
so that no feature is silently ignored. If kubectl is installed, a test compares its output with this renderer's.
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
    """Parses the documents of a YAML text, as YAML 1.1 like Kubernetes and Ray. Aliases become separate copies."""
    return [json.loads(json.dumps(document)) for document in yaml.load_all(text, yaml.CSafeLoader)]


def render(folder: Path) -> list[Document]:
    """All documents of a kustomization. Raises ValueError for a feature that this renderer does not support."""
    [kustomization] = read((folder / "kustomization.yaml").read_text())
    header = {key: kustomization.pop(key, None) for key in HEADER}
    if header != HEADER or (unknown := set(kustomization) - {"resources", "patches", "images"}):
        raise ValueError(f"{folder}: {unknown if header == HEADER else header} is not supported here")
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
        raise ValueError(f"{folder}: a patch must have a path and a target with kind and name, not {patch}")
    [operations] = read((folder / patch["path"]).read_text())
    wanted = (patch["target"]["kind"], patch["target"]["name"])
    if wanted not in {(d["kind"], d["metadata"]["name"]) for d in documents}:
        raise ValueError(f"{folder}: no document {wanted} to patch")
    return [jsonpatch.apply_patch(d, operations) if (d["kind"], d["metadata"]["name"]) == wanted else d for d in documents]


def _set_image(documents: list[Document], name: str, newName: str, newTag: str) -> None:  # noqa: N803
    for _, container in containers(documents):
        if container["image"] == name:
            container["image"] = f"{newName}:{newTag}"


def pods(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Every pod template, with the kind and name of its document."""
    for document in documents:
        spec, name = document.get("spec", {}), f"{document['kind']} {document['metadata']['name']}"
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]] if document["kind"] == "RayCluster" else [spec]
        for group in groups:
            if "template" in group:
                yield name, group["template"]


def containers(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Every container of every pod, with the kind and name of its document."""
    for name, pod in pods(documents):
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            yield name, container


def schema_error(document: Document) -> str | None:
    """Validates a document against the schema of its kind. Returns the error, or None. Unknown fields are errors."""
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
    schema = _forbid_unknown_fields(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {
        "type": "object",
        "required": ["name", "namespace"],
    }  # the definitions do not specify it
    return jsonschema.Draft202012Validator(schema)


def _forbid_unknown_fields(schema: Any) -> Any:
    """The schema with additionalProperties false for its objects, and Kubernetes' extensions translated to JSON schema."""
    if isinstance(schema, list):
        return [_forbid_unknown_fields(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _forbid_unknown_fields(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        strict["type"] = ["integer", "string"]
    if (
        isinstance(schema.get("properties"), dict)
        and "type" in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        strict.setdefault("additionalProperties", False)
    return strict
