"""Copies what some classes and functions need of this package's source: names in; one folder of flat modules out, as texts.

transformers copies the code of a model by following lines `from .NAME import` to files of the same folder, so a copy can
have no sub-packages and no absolute imports of this package. Of each module only the statements that are needed come along,
unchanged but for their imports; so there is one source of every formula, and a copy needs no pydantic, no Ray and no
jaxtyping. Annotations are not evaluated in a copy, so they need nothing: shapes such as Float[Tensor, "B T D"] stay, for
people. Called by transformers_folder. Needs no torch.
"""

import ast
import importlib.util
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeGuard

from lmu_dist.config import ConfigError

FUTURE = "from __future__ import annotations"
KNOWN = {*sys.stdlib_module_names, "numpy", "torch"}  # packages whose imports are copied for annotations too
# Packages whose names lead a module's name and say nothing in a folder of its own.
LEFT_OUT_PREFIXES = ("lmu_dist.exporting.remote.", "lmu_dist.models.", "lmu_dist.")


@dataclass(frozen=True)
class FlatModules:
    """The text of each file by its name, and the packages that the files import besides Python's own."""

    files: dict[str, str]
    packages: tuple[str, ...]


def flat_name(module: str) -> str:
    """Name of the copy of a module: lmu_dist.models.mixers.swiglu is mixers_swiglu."""
    prefix = next((prefix for prefix in LEFT_OUT_PREFIXES if module.startswith(prefix)), "")
    return module.removeprefix(prefix).replace(".", "_")


def collect(
    roots: Mapping[str, Sequence[str]],
    replaced: Mapping[str, str],
    texts: Mapping[str, str],
    header: str,
    own: Set[str],
) -> FlatModules:
    """Copies the named statements of the modules in `roots`, and all that they need; of a module without names, everything.

    `replaced` names the module that takes the place of another. `texts` has the source of modules that are in no file, such as
    a user's family. Modules of the packages `own` are copied, others imported. Each copy begins with `header`, a comment in
    which {module} is its name here. Raises ConfigError.
    """
    copies = _Collection(own, replaced, texts)
    for module, names in roots.items():
        copied = copies.module(module)
        for name in names or copied.bound:
            copies.need(copied, name)
    names = {flat_name(module) for module in copies.modules}
    assert len(names) == len(copies.modules), "two modules would have the same file"
    files = {f"{flat_name(name)}.py": module.text(header, copies) for name, module in copies.modules.items() if module.kept}
    return FlatModules(files, tuple(sorted(copies.packages)))


@dataclass
class _Module:
    """A module of which a part is copied: the statements in `kept`, and of its imports the names in `imported`."""

    name: str
    source: str
    kept: set[int] = field(default_factory=set)  # index of a statement
    imported: set[str] = field(default_factory=set)

    @cached_property
    def statements(self) -> list[ast.stmt]:
        return ast.parse(self.source).body

    @cached_property
    def bound(self) -> dict[str, int]:
        """The statement that binds a name, by its index: the last one if there are several."""
        return {name: i for i, statement in enumerate(self.statements) for name in _bound_names(statement)}

    def text(self, header: str, copies: "_Collection") -> str:
        """The copy. Lines above a statement - blank ones, comments - belong to it."""
        lines, result, start = self.source.splitlines(), [header.format(module=self.name)], 0
        rewritten = {node.lineno: node for i in self.kept for node in ast.walk(self.statements[i]) if _is_import(node)}
        has_docstring = bool(self.statements) and isinstance(self.statements[0], ast.Expr)
        if not has_docstring:
            result.append(FUTURE)
        for i, statement in enumerate(self.statements):
            end = statement.end_lineno or statement.lineno
            is_docstring = i == 0 and has_docstring
            if i in self.kept and not _is_import(statement) and lines[start:end][0].strip() and result[-1].strip():
                result.append("")  # the blank line went with a statement that is left out
            if i in self.kept or is_docstring:
                line = start
                while line < end:
                    node = rewritten.get(line + 1)
                    if node is None:
                        result.append(lines[line])
                        line += 1
                        continue
                    result.extend(copies.import_lines(self, node, top_level=node is statement))
                    line = node.end_lineno or node.lineno
            if is_docstring:
                result += ["", FUTURE]
            start = end
        return "\n".join(result) + "\n"


class _Collection:
    """All modules that are copied so far."""

    def __init__(self, own: Set[str], replaced: Mapping[str, str], texts: Mapping[str, str]) -> None:
        self.own, self.replaced, self.texts = own, replaced, texts
        self.modules = dict[str, _Module]()
        self.packages = set[str]()
        self._seen = set[tuple[str, str]]()

    def is_module(self, name: str) -> bool:
        """Whether a name is that of a module that is copied."""
        if name in self.texts or name in self.replaced:
            return True
        if name.partition(".")[0] not in self.own:
            return False
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # its parent is a module, not a package
            return False

    def module(self, name: str) -> _Module:
        """The module of a name, or the one that takes its place."""
        name = self.replaced.get(name, name)
        if name not in self.modules:
            source = self.texts.get(name)
            if source is None:
                spec = importlib.util.find_spec(name)
                source = spec.loader.get_source(name) if spec and spec.loader else None  # pyright: ignore[reportAttributeAccessIssue]
            if source is None:
                raise ConfigError(
                    f"the source of {name} cannot be read, so its code cannot be exported; install it as .py files"
                )
            self.modules[name] = _Module(name, source)
        return self.modules[name]

    def need(self, module: _Module, name: str) -> None:
        """Adds the statement that binds a name, and all that it needs."""
        if name not in module.bound or (module.name, name) in self._seen:  # else it is a name of Python, or a local one
            return
        self._seen.add((module.name, name))
        index = module.bound[name]
        statement = module.statements[index]
        module.kept.add(index)
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            _Uses(self, module).visit(statement)
            return
        module.imported.add(name)
        target, imported = self.target(module, statement, name)
        if self.is_module(target) and imported is not None:
            self.need(self.module(target), imported)
        elif not self.is_module(target):
            self.add_package(target)

    def need_all(self, name: str) -> None:
        """Adds a whole module: it is passed on as a value."""
        module = self.module(name)
        for bound in module.bound:
            self.need(module, bound)

    def add_package(self, target: str) -> None:
        """Notes a package that a copy imports."""
        package = target.partition(".")[0]
        if package in self.own:
            raise ConfigError(f"{target} is not found, so the code that imports it cannot be exported")
        if package not in sys.stdlib_module_names:
            self.packages.add(package)

    def target(self, module: _Module, node: ast.Import | ast.ImportFrom, name: str) -> tuple[str, str | None]:
        """(module, name in it) of what an import binds to a name; (module, None) if that is the module itself."""
        alias = next(alias for alias in node.names if (alias.asname or alias.name.partition(".")[0]) == name)
        if isinstance(node, ast.Import):
            return (alias.name if alias.asname else name), None
        source = node.module or ""
        if node.level:
            package = module.name.rsplit(".", node.level)[0]
            source = f"{package}.{source}" if source else package
        if self.is_module(f"{source}.{alias.name}"):
            return f"{source}.{alias.name}", None
        return source, alias.name

    def module_alias(self, module: _Module, name: str) -> str | None:
        """The copied module that a name of a module stands for, if it stands for one."""
        statement = module.statements[module.bound[name]] if name in module.bound else None
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            return None
        target, imported = self.target(module, statement, name)
        return target if imported is None and self.is_module(target) else None

    def import_lines(self, module: _Module, node: "ast.Import | ast.ImportFrom", top_level: bool) -> list[str]:
        """The lines of an import in a copy. Of an import of a module only the names that are needed are left."""
        lines, indent = [], " " * node.col_offset
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            if top_level and name not in module.imported:
                continue
            target, imported = self.target(module, node, name)
            if not self.is_module(target):
                kept = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
                lines.append(f"from {node.module} import {kept}" if isinstance(node, ast.ImportFrom) else f"import {kept}")
                continue
            flat = flat_name(self.module(target).name)
            found = flat if imported is None else imported
            where = "." if imported is None else f".{flat}"
            lines.append(f"from {where} import {found}" + ("" if found == name else f" as {name}"))
        return [indent + line for line in lines]


class _Uses(ast.NodeVisitor):
    """Adds to a collection what a statement needs. Annotations need nothing."""

    def __init__(self, copies: _Collection, module: _Module) -> None:
        self.copies, self.module = copies, module

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """All of it; annotations need nothing."""
        defaults = [default for default in (*node.args.defaults, *node.args.kw_defaults) if default is not None]
        for part in (*node.decorator_list, *defaults, *node.body):
            self.visit(part)
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg)
        for annotation in (*(argument.annotation for argument in arguments if argument), node.returns):
            self._visit_annotation(annotation)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """All of it; the annotation needs nothing."""
        if node.value is not None:
            self.visit(node.value)
        self._visit_annotation(node.annotation)

    def _visit_annotation(self, node: ast.expr | None) -> None:
        """Copies the imports of well-known packages for an annotation, so that it can be read."""
        for name in (part.id for part in ast.walk(node or ast.Pass()) if isinstance(part, ast.Name)):
            statement = self.module.statements[self.module.bound[name]] if name in self.module.bound else None
            if isinstance(statement, ast.Import | ast.ImportFrom):
                target, _ = self.copies.target(self.module, statement, name)
                if target.partition(".")[0] in KNOWN:
                    self.copies.need(self.module, name)

    def visit_Try(self, node: ast.Try) -> None:
        """All of it; but a package whose import may fail is not needed."""
        before = set(self.copies.packages)
        self.generic_visit(node)
        if any(isinstance(h.type, ast.Name) and h.type.id in ("ImportError", "ModuleNotFoundError") for h in node.handlers):
            self.copies.packages &= before

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Of a module only the attribute, of other values all."""
        target = self.copies.module_alias(self.module, node.value.id) if isinstance(node.value, ast.Name) else None
        if target is None or not isinstance(node.value, ast.Name):
            self.generic_visit(node)
            return
        self.copies.need(self.module, node.value.id)
        self.copies.need(self.copies.module(target), node.attr)

    def visit_Name(self, node: ast.Name) -> None:
        """What the name is bound to."""
        self.copies.need(self.module, node.id)
        if (target := self.copies.module_alias(self.module, node.id)) is not None:
            self.copies.need_all(target)

    def _visit_import(self, node: ast.Import | ast.ImportFrom) -> None:
        """An import inside a function."""
        for alias in node.names:
            target, imported = self.copies.target(self.module, node, alias.asname or alias.name.partition(".")[0])
            if not self.copies.is_module(target):
                self.copies.add_package(target)
            elif imported is None:
                self.copies.need_all(target)
            else:
                self.copies.need(self.copies.module(target), imported)

    visit_Import = visit_ImportFrom = _visit_import  # noqa: N815


def _is_import(node: ast.AST) -> TypeGuard[ast.Import | ast.ImportFrom]:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _bound_names(statement: ast.stmt) -> list[str]:
    """The names that a statement of a module binds."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [statement.name]
        case ast.Import() | ast.ImportFrom():
            return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
        case _:
            return [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
