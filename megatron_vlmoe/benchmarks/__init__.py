"""What this project's parts cost, each beside what a user could take instead, in one run on the same machine."""
