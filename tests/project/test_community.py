"""The files that GitHub and citation managers read have what these need."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(file):
    return yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))


# Citation File Format 1.2.0: what must be there, and what a person or an entity may be.


def is_author(author):
    return "name" in author or {"family-names", "given-names"} <= set(author)


def test_the_citation_has_the_required_fields():
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert all(map(is_author, citation["authors"]))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


@pytest.mark.parametrize("reference", read("CITATION.cff")["references"], ids=lambda r: r["title"])
def test_a_reference_can_be_cited_and_found(reference):
    assert {"type", "title", "authors", "year", "url"} <= set(reference)
    assert all(map(is_author, reference["authors"]))
    if reference["type"] == "conference-paper":
        assert reference["conference"]["name"]
    else:
        assert reference["type"] == "article"
        assert reference["journal"]
    (identifier,) = reference["identifiers"]
    assert identifier["type"] == "doi"
    number = re.fullmatch(r"10\.48550/arXiv\.(\d{4}\.\d{5})", identifier["value"]).group(1)
    assert "arxiv.org" not in reference["url"] or reference["url"].endswith(f"/abs/{number}")


def test_every_method_that_has_a_paper_is_cited():
    titles = [reference["title"] for reference in read("CITATION.cff")["references"]]
    starts = [title.split(":")[0] for title in titles]
    assert {"LoRA", "LoRA+", "LoRA-GA", "LoRA-One", "OLoRA", "PiSSA"} <= set(starts)
    assert any("Rank Stabilization" in title for title in titles)
    assert any("Riemannian Preconditioned" in title for title in titles)


def test_the_readme_cites_the_same_paper():
    first = read("CITATION.cff")["references"][0]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert first["title"] in readme
    assert first["url"] in readme


NEEDED = {"dropdown": "options", "checkboxes": "options", "markdown": "value"}


@pytest.mark.parametrize("form", FORMS, ids=lambda file: file.stem)
def test_an_issue_form_is_one_that_github_shows(form):
    content = read(form)
    assert {"name", "description", "body"} <= set(content)
    asked = [element for element in content["body"] if element["type"] != "markdown"]
    assert asked
    assert len({element["id"] for element in asked}) == len(asked)
    assert len({element["attributes"]["label"] for element in asked}) == len(asked)
    for element in content["body"]:
        kind, attributes = element["type"], element["attributes"]
        assert kind in {"checkboxes", "dropdown", "input", "markdown", "textarea"}
        if kind in NEEDED:
            assert attributes[NEEDED[kind]]
        if kind == "dropdown":
            options = attributes["options"]
            assert all(isinstance(option, str) for option in options)
            assert len(set(options)) == len(options)


def test_there_is_a_form_for_each_kind_of_report():
    assert {form.stem for form in FORMS} == {"bug", "new_method", "published_number"}


def targets():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z]+):", text, re.MULTILINE))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_is_bounded_reads_only_and_calls_what_exists(workflow):
    content = read(workflow)
    assert content[True]  # YAML 1.1 reads the key `on` as true
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 120
        for step in job["steps"]:
            assert "uses" in step or "run" in step
            for target in re.findall(r"\bmake ([\w-]+)", step.get("run", "")):
                assert target in targets()
            for script in re.findall(r"\bpython\S* (\S+\.py)", step.get("run", "")):
                assert (ROOT / script).is_file()


def test_the_workflow_runs_what_ci_runs():
    steps = read(".github/workflows/test.yml")["jobs"]["test"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert commands[-1] == ci[-1] == "make test"


def test_ci_uses_the_lowest_python_and_the_check_of_versions_each_that_is_claimed():
    steps = read(".github/workflows/test.yml")["jobs"]["test"]["steps"]
    (lowest,) = (step["with"]["python-version"] for step in steps if "with" in step)
    assert f">={lowest}" == PROJECT["requires-python"]
    jobs = read(".github/workflows/versions.yml")["jobs"]["versions"]["strategy"]["matrix"][
        "include"
    ]
    label = "Programming Language :: Python :: 3."
    claimed = {c.split(" :: ")[-1] for c in PROJECT["classifiers"] if c.startswith(label)}
    assert {job["python"] for job in jobs} == claimed
