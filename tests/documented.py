"""The code blocks of README, docs and the pages beside them, and which test runs each.

tests/docs/test_documented.py fails where a block or a command stands in no table, or a table names what is not there.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL_CARD = "edit_ray/assets/tiny_wan/README.md"
PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "monitoring/README.md", "examples/README.md", "deploy/README.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    MODEL_CARD,
]
SHELL = ("console", "bash")

HERE, ON_RAY, SITE, OF_DOCS = (
    f"tests/{name}.py" for name in ("docs/test_documented", "ray/test_documented", "docs/test_site", "docs/test_docs")
)
TUTORIAL = "tests/ray/test_tutorial.py::test_the_tutorial"
DOOR = "tests/ray/test_door_command.py::test_the_page_about_http"
FRESH = f"{SITE}::test_pages_that_are_made_from_the_code_are_fresh"
OF_README = f"{SITE}::test_the_code_of_the_readme_runs"
# What is not a command: (page, language) -> the tests that run every such block of the page.
BLOCKS = {
    ("README.md", "python"): (OF_README, "tests/ray/test_examples.py::test_the_client_of_the_readme_runs", DOOR),
    ("docs/caching.md", "python"): (f"{OF_DOCS}::test_the_quick_start_runs", f"{OF_DOCS}::test_a_section_runs"),
    ("docs/caching.md", "toml"): (f"{OF_DOCS}::test_the_entry_point_is_the_one_that_is_looked_up",),
    ("docs/conditioning.md", "python"): (f"{OF_DOCS}::test_the_code_of_the_page_on_conditions_runs",),
    ("docs/causal.md", "python"): ("tests/docs/test_docs_causal.py::test_the_code_runs",),
    ("docs/http.md", "python"): (DOOR,),
    ("docs/http.md", "json"): ("tests/unit/test_door.py::test_the_error_on_the_page_has_the_form_of_all",),
    ("docs/long-video.md", "python"): (f"{OF_DOCS}::test_the_code_of_the_page_on_long_videos_runs",),
    ("docs/tutorial.md", "python"): (TUTORIAL,),
    ("docs/tutorial.md", "toml"): (TUTORIAL,),
    ("docs/sizing.md", "text"): (FRESH,),
    ("docs/architecture.md", ""): (f"{HERE}::test_the_drawings_name_what_is_there",),
    (MODEL_CARD, "python"): (f"{HERE}::test_the_code_of_the_model_card_runs",),
}
WITH_YAML = (
    "monitoring/README.md",
    *(f"docs/{name}.md" for name in ("caching", "causal", "conditioning", "long-video", "on-my-card", "speed")),
)
BLOCKS |= {(page, "yaml"): (f"{SITE}::test_configurations_are_valid",) for page in WITH_YAML}

# Pages and commands as expressions, and the test that runs all that match and that no earlier line has.
COMMANDS = (
    ("docs/tutorial.md", ".*", TUTORIAL),
    ("README.md", r".*pip install .*|python3 -m venv .*", f"{HERE}::test_it_is_installed_as_the_readme_says"),
    ("docs/http.md", "edit-ray serve .*", DOOR),
    ("README.md", "make demo", f"{ON_RAY}::test_the_demo"),
    ("CONTRIBUTING.md", "make docs", f"{SITE}::test_the_site_is_built_without_a_warning"),
    ("monitoring/README.md", "make monitor", f"{HERE}::test_a_prometheus_is_started"),
    # Those are what `generated` runs: the folder of their models holds what a plan reads, and no weights.
    ("docs/sizing.md", ".*", FRESH),
    ("docs/causal.md", "edit-ray convert .*", "tests/docs/test_docs_causal.py::test_the_command_converts"),
    (".*", r"edit-ray (plan|report record\.json|make-model).*", f"{HERE}::test_a_quick_command_runs"),
    (".*", r"edit-ray (calibrate|tune) .*|python benchmarks/.*", f"{HERE}::test_a_dear_command_runs"),
    (".*", "export RAY_AUTH_MODE=token", "tests/ray/test_readme_job.py::test_readme_job"),
    # What the shared Ray of the tests was started with, at ports and in a folder of its own.
    (".*", r"(EDIT_RAY_MODEL_ROOTS=\S+ )?ray start --head( --dashboard-host [\d.]+)?", "tests/conftest.py::ray_head"),
    (".*", r"ray (job submit|get-auth-token) .*|edit-ray .*", f"{ON_RAY}::test_the_commands_of_runs"),
)

# Run by no test, and why.
LEFT_OUT = {
    "make test": "this is a part of it",
    "make fix": "it would change the clone; `make check` asks for the same without changing",
    "make proof": "this is a part of it",
    "make coverage": "this is a part of it",
    "make page": "installs from npm's registry; the page with what it installs is tested in test_page_chromium.py",
    "sudo apt-get install prometheus": "changes the machine",
    "cd monitoring": "for Docker",
    "export EDIT_RAY_OUTPUT=~/edit_ray_outputs MONITORING_USER=$(id -u):$(id -g) GRAFANA_PASSWORD=...": "for Docker",
    "docker compose up": "needs Docker; its files are checked in test_dashboards.py",
    "npm install --prefix monitoring/drawing --ignore-scripts": "installs from npm's registry",
    "python monitoring/drawing/draw.py check": "needs what the line before installs",
    "python monitoring/drawing/draw.py draw --into build/drawn": "needs what two lines before are installed",
    "docker build -f deploy/Dockerfile -t edit-ray:0.1.0 .": "needs Docker; test_deploy.py checks the file",
    'kubectl create secret generic edit-ray-metrics-token --from-literal=token="$(openssl rand -hex 32)"': "a cluster",
    "kubectl apply -f deploy/kuberay/volumes.yaml": "needs a cluster; test_deploy.py checks the files",
    "kubectl apply -f deploy/kuberay/ray-job.yaml": "needs a cluster",
    'kubectl create secret generic edit-ray-door-token --from-literal=token="$(openssl rand -hex 32)"': "a cluster",
    "kubectl apply -f deploy/kuberay/ray-service.yaml": "needs a cluster; test_deploy.py checks the file",
    "kubectl apply -f deploy/kuberay/pod-monitor.yaml -f deploy/kuberay/prometheus-rule.yaml": "needs a cluster",
    "pip install -c constraints.txt git+file:///path/to/clone": "the line before it, by way of git's partial clone",
    "pip install -c constraints.txt -e '.[serve]'": "that of the README, with an extra that the tests have",
    "uv venv && uv pip install -c constraints.txt -e .": "another installer, for what the lines before do with pip",
    "ffplay stream.mp4": "needs a screen; test_playing.py plays the files with ffmpeg",
    "ffplay -live_start_index 0 live.m3u8": "needs a screen",
    "torchrun --nproc_per_node=2 training/tiny_wan.py --output DIR --state DIR --minutes 7.4": "two GPUs",
    "torchrun --nproc_per_node=2 training/tiny_wan.py --output DIR --state DIR2 --minutes 6 "
    "--stage text_and_transformer --weights DIR --learning-rate 8e-4": "two GPUs",
    "python training/tiny_wan.py --output DIR --state DIR3 --minutes 14 "
    "--stage text_and_transformer --weights DIR --learning-rate 8e-4": "minutes of a GPU",
}


@dataclass(frozen=True)
class Block:
    """What stands between two fences, without their indentation."""

    page: str
    language: str
    code: str


def blocks(page, *languages):
    """The blocks of a page in these languages, or all."""
    text = (ROOT / page).read_text()
    found = re.findall(r"^( *)```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [
        Block(page, language, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE))
        for indent, language, code in found
        if not languages or language in languages
    ]


def run_code(page, codes, replaced, names=None):
    """Runs the code of a page one after the other, with some of its text replaced; the names that it leaves."""
    names = {} if names is None else names
    for code in codes:
        for old, new in replaced.items():
            code = code.replace(old, new)
        exec(compile(code, f"<{page}>", "exec"), names)
    return names


def commands(page):
    """The commands of a page, each as it is printed, without the comment behind it."""
    text = re.sub(r"\\\n *", "", "".join(block.code for block in blocks(page, *SHELL)))
    return [command.strip() for line in text.splitlines() for command in line.partition(" #")[0].split(";")]


def runner_of(page, command):
    """The test that runs a command of a page; None where none does."""
    if command in LEFT_OUT:
        return None
    return next((by for of, each, by in COMMANDS if re.fullmatch(of, page) and re.fullmatch(each, command)), None)


def run_by(test):
    """(page, command) of all commands that a test has to run, in the order of the pages."""
    return [(page, command) for page in PAGES for command in commands(page) if runner_of(page, command) == test]


def replaced(command, table):
    """The words of a command, its names changed after a table."""
    for old, new in table.items():
        command = re.sub(rf"(?<!\S){re.escape(old)}(?!\S)", new.replace("\\", r"\\"), command)
    return shlex.split(command)
