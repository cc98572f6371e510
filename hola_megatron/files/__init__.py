"""Reading of files: every file that the project reads goes through this package.

    reading.py    bytes, text and JSON of a file, within limits of size and depth
    yaml_text.py  YAML of recipes: plain values only, without the surprises of YAML 1.1
    schemas.py    what each JSON file must look like (pydantic)
    tensors.py    safetensors files

Whatever the bytes are, a reader here returns a checked value or raises a `FileProblem` whose text is one line
("missing", "cannot be read (...)", "damaged (...)"). The caller adds the path and what to do:

    try:
        record = read_json(path, schemas.EXPORT_RECORD)
    except MissingFile:
        return {}
    except FileProblem as problem:
        raise CheckpointError(f"{path}: {problem}; export again") from None

Needs neither torch nor transformers (tensors.py imports safetensors when it is called).
"""

from hola_megatron.files import schemas
from hola_megatron.files.reading import (
    DamagedFile,
    FileProblem,
    MissingFile,
    UnreadableFile,
    check_schema,
    one_line,
    parse_json,
    parse_json_lines,
    read_bytes,
    read_json,
    read_text,
    shown,
)

__all__ = ["DamagedFile", "FileProblem", "MissingFile", "UnreadableFile", "check_schema", "one_line", "parse_json",
           "parse_json_lines", "read_bytes", "read_json", "read_text", "schemas", "shown"]
