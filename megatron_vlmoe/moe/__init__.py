"""Mixture-of-experts building blocks: routing, auxiliary losses, dispatch and experts."""
