"""A report becomes a picture of its errors."""

import pytest

import jaxquant as jq
from experiments.report_picture import main


def row(path, error):
    return jq.WeightReport(path, "gptq", 20.0, error, 0.02, 64, 0.01, 0, 0.5)


def test_a_report_is_drawn(tmp_path):
    report = jq.Report()
    for path, error in (("a/kernel", 0.01), ("b/kernel", 0.015)):
        report(row(path, error))
    (tmp_path / "report.json").write_text(report.to_json())
    main([str(tmp_path / "report.json"), str(tmp_path / "report.png")])
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_without_errors_cannot_be_drawn(tmp_path):
    report = jq.Report()
    report(row("a/kernel", None))
    (tmp_path / "report.json").write_text(report.to_json())
    with pytest.raises(ValueError, match="no output errors"):
        main([str(tmp_path / "report.json"), str(tmp_path / "report.png")])
