"""Builds a torch extension, for test_toolchain. In a module of its own, so that a spawned process can import it."""

from pathlib import Path

from torch.utils import cpp_extension

from lmu_dist.toolchain import configure_extension_builds


def build(folder: Path) -> None:
    """Builds and loads the extension in the folder, as DeepSpeed builds its own."""
    configure_extension_builds()
    cpp_extension.load("small", [str(folder / "small.cpp")], build_directory=str(folder), is_python_module=False)
