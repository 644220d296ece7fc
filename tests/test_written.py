"""How numbers are written."""

import numpy as np

from race import written


def test_numbers_are_written_one_way():
    assert written.percent(0.7589) == "75.9 %" and written.percent(1) == "100.0 %"
    assert [written.signed(value) for value in (24.19, -0.26, 0.04, -0.04)] == ["+24.2", "−0.3", "0.0", "0.0"]
    assert [written.rate(value) for value in (2.5e-5, 0.00025, 2e-6, 0.01)] == ["2.5e-5", "2.5e-4", "2e-6", "1e-2"]
    expected = ["p < 0.001", "p = 0.0012", "p = 0.032", "p = 0.35", "p = 1.00", "p = 0.04996", "p = 0.05"]
    assert [written.p_value(p) for p in (1e-9, 0.00123, 0.0321, 0.349, 1.0, 0.04996, 0.0502)] == expected
    assert written.p_number(np.nan) == "–"
    assert [written.listed(names) for names in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]
    recipe = {"schedule": "linear", "warmup": 1000, "max_grad_norm": 1.0}
    assert (
        written.schedule(recipe) == "linear, warm-up 1000, clipped at 1"
        and written.schedule({"warmup": 0}) == "constant"
    )
    assert written.listed("abc", 3) == "a, b and c" and written.listed("abcd", 3) == "4 others"
