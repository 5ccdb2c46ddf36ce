"""miniclip installs and imports in the three ways that people use it, and importing it costs little."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE_PACKAGES = sysconfig.get_path("purelib")
SHOW = "import miniclip.kernels, miniclip.weights; print(miniclip.__file__, miniclip.weights.__file__, sep='\\n')"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy, so that building leaves nothing behind in the real one."""
    copy = tmp_path_factory.mktemp("checkout") / "miniclip"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "__pycache__", "tests")
    return shutil.copytree(ROOT, copy, ignore=ignored)


def install(source: Path, prefix: Path, *options: str) -> Path:
    """pip-install `source` alone under `prefix`; returns the new site-packages."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--ignore-installed", "--prefix", prefix, *options, source], check=True)
    return next(prefix.rglob("*-packages"))


def imported_from(site: Path, folder: Path, show: str = SHOW) -> list[str]:
    """What `show` prints in `folder`, installed in `site` alone: by default the files of miniclip and its weights."""
    # -S leaves out the .pth files of the surrounding environment, where miniclip may be installed too.
    code = f"import site, sys; sys.path[:0] = ['']; site.addsitedir({str(site)!r}); sys.path += [{SITE_PACKAGES!r}]; "
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", code + show]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_installed_and_used_from_elsewhere_or_from_the_checkout(checkout, tmp_path):
    site = install(checkout, tmp_path / "plain")
    assert imported_from(site, tmp_path) == [
        str(site / "miniclip/__init__.py"),
        str(site / "miniclip/weights/__init__.py"),
    ]
    assert imported_from(site, checkout) == [
        str(checkout / "miniclip/__init__.py"),
        str(checkout / "weights/__init__.py"),
    ]
    assert not (site / "kernels").exists()  # names that others use at the top level
    assert not (site / "weights").exists()
    assert (site / "miniclip/bpe_simple_vocab_16e6.txt.gz").exists()
    assert (site / "miniclip/data/sample.zip").exists()
    assert (site / "miniclip/data/imagenet_classes.txt.gz").exists()
    for installed, folder in (("web", "miniclip/web"), ("port_js", "examples/port_js")):
        scripts = {file.name for file in (ROOT / folder).glob("*.js")}
        assert len(scripts) >= 5 and {file.name for file in (site / "miniclip" / installed).glob("*.js")} == scripts
    code = "from miniclip.web.folder import PORT; print(PORT)"
    assert imported_from(site, tmp_path, code) == [str(site / "miniclip/port_js")]
    assert imported_from(site, checkout, code) == [str(checkout / "examples/port_js")]
    assert {file.name for file in (site / "miniclip/weights").glob("*.gz")} == {
        file.name for file in (ROOT / "weights").glob("*.gz")
    }


def test_installed_editable(checkout, tmp_path):
    site = install(checkout, tmp_path / "editable", "--editable")
    expected = [str(checkout / "miniclip/__init__.py"), str(checkout / "weights/__init__.py")]
    assert imported_from(site, tmp_path) == expected
    assert imported_from(site, checkout) == expected


def test_importing_miniclip_imports_nothing_that_is_not_needed_yet():
    code = (
        "import sys, torch; before = set(sys.modules); import miniclip; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "miniclip" in done.stdout.split()
    assert not {"triton", "matplotlib", "ftfy", "regex", "transformers"} & set(done.stdout.split())


def test_ci_runs_the_command_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert '\npip install -c constraints.txt -e ".[test]" && pytest\n' in readme
    assert "\npip install -c constraints.txt -e . && python examples/zero_shot.py\n" in readme
    assert os.access(ROOT / ".ci/run", os.X_OK)
