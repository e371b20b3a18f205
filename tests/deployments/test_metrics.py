import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.metrics import merge

TEXT = """# HELP ballast_requests_replayed_total Requests that went on
# TYPE ballast_requests_replayed_total counter
ballast_requests_replayed_total{{model="demo",replica="{0}"}} {1}
# HELP ballast_estimate_bytes Estimated "memory"
# TYPE ballast_estimate_bytes gauge
ballast_estimate_bytes{{item="weights",model="demo",replica="{0}"}} 5e+06
"""


def test_each_family_is_declared_once_with_the_samples_of_all() -> None:
    merged = merge([TEXT.format("x", "1.0"), TEXT.format("y", "2.0")])
    assert merged.count("# TYPE ballast_requests_replayed_total counter") == 1
    assert merged.count("# TYPE ballast_estimate_bytes gauge") == 1
    replayed, estimate = text_string_to_metric_families(merged)
    assert [(s.labels["replica"], s.value) for s in replayed.samples] == [("x", 1.0), ("y", 2.0)]
    assert [s.labels["replica"] for s in estimate.samples] == ["x", "y"]


def test_a_family_that_only_one_has_is_kept() -> None:
    one = TEXT.format("x", "1.0")
    merged = merge([one, "# TYPE other gauge\nother 1.0\n"])
    names = [family.name for family in text_string_to_metric_families(merged)]
    assert names == ["ballast_requests_replayed", "ballast_estimate_bytes", "other"]


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_replica_is_an_empty_text(texts: list[str]) -> None:
    assert merge(texts) == ""


def test_labels_survive_with_every_character() -> None:
    label = 'a\\b"c\nd'
    escaped = label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    merged = merge([f'# TYPE a gauge\na{{b="{escaped}"}} 1.0\n'])
    (family,) = text_string_to_metric_families(merged)
    assert family.samples[0].labels == {"b": label}
