"""Run tests with the lowest versions that pyproject.toml allows, or with the newest there are.

    python scripts/check_versions.py lowest               # the library and the reports
    python scripts/check_versions.py newest
    python scripts/check_versions.py lowest tests/core    # arguments for pytest

Each choice, and each Python that runs this, has an environment in ``build/versions``, made or
brought up to date first. That needs a network; torch's default builds bring several gigabytes.
"""

import argparse
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The harness is tested with the versions of requirements.txt only.
EXTRAS = ("reports",)
TESTS = ("tests/core", "tests/reports")
# What these tests need besides: published numbers are compared with the presets in conf/.
TOOLS = ("pytest", "hydra-core")


def main() -> int:
    """Install, list what is installed, run the tests; return pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", choices=["lowest", "newest"])
    options, for_pytest = parser.parse_known_args()

    wanted = declared(ROOT / "pyproject.toml")
    if options.versions == "lowest":
        wanted = [lowest(requirement) for requirement in wanted]
    name = f"{options.versions}-python{sys.version_info.major}.{sys.version_info.minor}"
    folder = ROOT / "build" / "versions" / name
    if not folder.exists():
        venv.create(folder, with_pip=True, symlinks=True)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade", *TOOLS, *wanted]
    subprocess.run(install, check=True)
    subprocess.run([python, "-m", "pip", "list"], check=True)
    return subprocess.call([python, "-m", "pytest", *(for_pytest or TESTS)], cwd=ROOT)


def declared(pyproject: Path) -> list[str]:
    """The requirements of the library and of ``EXTRAS``."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return project["dependencies"] + [line for extra in EXTRAS for line in extras[extra]]


def lowest(requirement: str) -> str:
    """Turn ``name>=version`` into ``name==version``."""
    return requirement.replace(">=", "==")


if __name__ == "__main__":
    sys.exit(main())
