"""What a process does that builds a torch extension, in the tests of the toolchain; to be given to one, it has a file."""

from pathlib import Path

from torch.utils import cpp_extension

from lmu_dist.toolchain import prepare_builds


def build(folder: Path) -> None:
    """Builds and loads the extension in the folder, as DeepSpeed does with its own."""
    prepare_builds()
    cpp_extension.load("small", [str(folder / "small.cpp")], build_directory=str(folder), is_python_module=False)
