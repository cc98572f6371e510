"""Size of DeepSpeed's reduce bucket; without torch, for the planner as well."""

BUCKET = 50_000_000  # elements


def bucket_elements(parameters: int) -> int:
    """Elements of the bucket for a rank's parameters."""
    return min(BUCKET, parameters)
