"""Common tests that fail on our classes, with the reason why that is right."""

from __future__ import annotations

# Reason: patterns of "Class::test".
NOT_APPLICABLE: dict[str, list[str]] = {
    "the heads that predict tokens have weights of their own, and the configuration refuses to tie them": [
        "*::test_tied_weights_keys"
    ],
}
