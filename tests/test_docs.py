"""The documents, held to the code: fields and metrics are named, files and links exist."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from deployments.config import (
    DeviceConfig,
    GatewayConfig,
    LimitsConfig,
    ModelConfig,
    RecoveryConfig,
)
from deployments.engines.registry import ENGINES
from deployments.faults import Fault
from deployments.oom import Cause
from deployments.openai.errors import TYPES
from deployments.phases import Phase
from deployments.supervisor import State
from vram.ladder import STEPS
from vram.shortage import ShortageKind

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "benchmarks/README.md", *(ROOT / "docs").rglob("*.md")])
CONFIGS = (ModelConfig, GatewayConfig, RecoveryConfig, LimitsConfig, DeviceConfig)
# Hosts of package indices: pip decides where packages come from, no page does.
REGISTRIES = re.compile(
    r"pypi\.org|pythonhosted|download\.pytorch\.org|artifactory|/simple\b", re.I
)
PRIVATE_PATHS = re.compile(r"(?<![\w.])/(?:work|root|home)\b")
LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#]*)(?:#(?P<anchor>[^)]*))?\)")
EMPTY_CELL = "<!-- bench -->"


@pytest.fixture(scope="module")
def operation() -> str:
    return (ROOT / "docs/operation.md").read_text()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_of_a_config_is_in_the_reference(
    operation: str, config: type[BaseModel]
) -> None:
    assert [name for name in config.model_fields if f"`{name}`" not in operation] == []


def test_every_field_and_phase_of_a_fault_is_in_its_page() -> None:
    page = (ROOT / "docs/faults.md").read_text()
    assert [name for name in (*Fault.model_fields, *Phase) if f"`{name}`" not in page] == []


@pytest.mark.parametrize("config", [RecoveryConfig, LimitsConfig, DeviceConfig])
def test_the_reference_has_the_defaults_of_the_code(
    operation: str, config: type[BaseModel]
) -> None:
    for name, field in config.model_fields.items():
        if isinstance(field.default, bool) or not isinstance(field.default, int | float):
            continue
        row = re.search(rf"^\| `{name}` \| (?P<default>[^|]+) \|", operation, re.MULTILINE)
        assert row is not None, name
        assert float(row["default"]) == field.default, name


@pytest.mark.parametrize(("status", "kind"), TYPES.items())
def test_every_status_of_an_error_is_in_the_api_s_table(status: int, kind: str) -> None:
    assert f"\n| {status} | `{kind}`" in (ROOT / "docs/api.md").read_text()


def test_every_metric_is_in_the_reference(operation: str) -> None:
    names = set(re.findall(r'"(ballast_\w+)"', (ROOT / "deployments/status.py").read_text()))
    assert names
    assert [name for name in sorted(names) if f"`{name}`" not in operation] == []


def test_no_metric_is_in_the_reference_that_there_is_not(operation: str) -> None:
    code = (ROOT / "deployments/status.py").read_text()
    named = re.findall(r"`(ballast_\w+)`", operation)
    assert [name for name in named if f'"{name}"' not in code] == []


def test_every_state_and_engine_is_in_the_reference(operation: str) -> None:
    assert [word for word in (*State, *ENGINES) if f"`{word}`" not in operation] == []


def test_every_rung_is_in_the_description_of_the_ladder() -> None:
    recovery = (ROOT / "docs/recovery.md").read_text()
    for step in STEPS:
        context = step.max_model_len or "as planned"
        assert f"| `{step.name}` | {step.gpu_memory_utilization:.2f} | {context} |" in recovery


@pytest.mark.parametrize("word", [*Cause, *ShortageKind], ids=str)
def test_every_cause_and_shortage_is_in_the_table_of_causes(word: str) -> None:
    _, _, section = (ROOT / "docs/recovery.md").read_text().partition("## Causes")
    assert f"\n| `{word}` |" in section.partition("\n## ")[0]


def test_every_cause_is_in_the_vocabulary() -> None:
    vocabulary = (ROOT / "docs/vocabulary.md").read_text()
    (row,) = [line for line in vocabulary.splitlines() if line.startswith("| cause |")]
    assert re.findall(r"`(\w+)`", row) == list(Cause)


def test_every_file_of_the_readme_s_tree_exists() -> None:
    _, _, section = (ROOT / "README.md").read_text().partition("## The tree")
    tree = section.split("```text\n")[1].split("```")[0]
    folder = ""
    for line in tree.splitlines():
        name, purpose = line.split(maxsplit=1)
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            assert (ROOT / name).exists(), name
        else:
            assert (ROOT / folder / name).exists(), folder + name
        assert purpose


def test_every_package_is_in_the_readme_s_tree() -> None:
    readme = (ROOT / "README.md").read_text()
    packages = [init.parent for init in ROOT.glob("*/__init__.py")]
    assert packages
    assert [p.name for p in packages if f"\n{p.name}/ " not in readme] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_no_registry_and_no_path_of_one_machine(page: Path) -> None:
    text = page.read_text()
    assert REGISTRIES.findall(text) == []
    assert PRIVATE_PATHS.findall(text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_its_heading(page: Path) -> None:
    for link in LINK.finditer(page.read_text()):
        target = (page.parent / link["path"]).resolve() if link["path"] else page
        assert target.exists(), link[0]
        if link["anchor"]:
            assert link["anchor"] in anchors(target), link[0]


def test_files_that_pages_name_exist() -> None:
    """`deployments/keeper.py` in a text, with or without what is in it."""
    named = re.compile(r"`((?:vram|placement|deployments|cluster|tests|scripts)/[\w/.-]+)`")
    for page in PAGES:
        for name in named.findall(page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_tests_that_pages_name_exist() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert f"def {name}(" in tests, f"{page.name}: {name}"


def test_the_structure_fits_on_a_screen() -> None:
    assert len((ROOT / "docs/structure.md").read_text().splitlines()) <= 50


def test_a_decision_fits_on_half_a_page_and_says_what_would_undo_it() -> None:
    decisions = sorted((ROOT / "docs/decisions").glob("*.md"))
    numbers = [decision.name.partition("-")[0] for decision in decisions]
    assert len({*numbers}) == len(numbers)
    for number, decision in zip(numbers, decisions, strict=True):
        text = decision.read_text()
        assert re.fullmatch(r"\d{4}", number)
        assert text.startswith(f"# {number} ")
        assert len(text.splitlines()) <= 30
        for part in ("**Context.**", "**Choice.**", "**Cost.**", "**Undone by**"):
            assert part in text, f"{decision.name} has no {part}"


def test_the_one_line_of_the_readme_is_one_line_of_dev_yaml() -> None:
    readme = (ROOT / "README.md").read_text()
    _, _, section = readme.partition("## A real model")
    (line,) = section.split("```yaml\n")[1].split("```")[0].splitlines()
    dev = (ROOT / "serve_configs/dev.yaml").read_text()
    assert "      model: .models/demo\n" in dev
    changed = yaml.safe_load(dev.replace("      model: .models/demo", line, 1))
    assert changed["applications"][1]["args"]["model"] == "Qwen/Qwen2.5-0.5B-Instruct"


def test_the_table_of_the_readme_is_all_measured_or_all_empty() -> None:
    _, _, section = (ROOT / "README.md").read_text().partition("## Beside its neighbours")
    rows = [line for line in section.partition("## ")[0].splitlines() if line.startswith("| ")][1:]
    cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")[1:]]
    assert rows
    assert cells.count(EMPTY_CELL) in (0, len(cells))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
