"""What curators say of outputs, from a table that a spreadsheet has saved."""

import csv
from pathlib import Path

from engine.batch.catalog import REVIEWS, Row, add_reviews, read_catalog
from engine.errors import PlanError

_MOST_NAMED = 20


def import_reviews(out: Path, table: Path) -> int:
    """Stores the reviews in a CSV file for the batch in the folder `out`; how many they were.

    Columns: `name` as in the catalog, `review` (pending, accepted or rejected) and, if wanted, `note`; a comma or a
    semicolon between them, UTF-8. Raises PlanError, with all that is wrong in the file, before anything is stored.
    """
    known = read_catalog(out)
    reviews: dict[str, tuple[str, str | None]] = {}
    wrong: list[str] = []
    for number, line in _lines(table):
        name, review = line["name"], line["review"].strip().lower()
        if problem := _problem(name, review, known, reviews):
            wrong.append(f"line {number}: {problem}")
        reviews[name] = (review, line.get("note", "").strip() or None)
    if wrong:
        more = f"; and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
        raise PlanError(
            f"{table}: {len(wrong)} lines cannot be taken, so no review was stored: "
            f"{'; '.join(wrong[:_MOST_NAMED])}{more}. Correct them, then import the file again"
        )
    if reviews:
        add_reviews(out, reviews)
    return len(reviews)


def _problem(name: str, review: str, known: dict[str, Row], earlier: dict[str, tuple[str, str | None]]) -> str:
    if name not in known:
        return f"{name!r} is not in the catalog"
    if name in earlier:
        return f"{name!r} was reviewed in an earlier line"
    return "" if review in REVIEWS else f"{review!r} is not one of {', '.join(REVIEWS)}"


def _lines(table: Path) -> list[tuple[int, dict[str, str]]]:
    """Number in the file and fields of each line that is not empty."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=";" if ";" in head else ",", restval="", restkey="", strict=True)
            fields = reader.fieldnames or ()
            if not {"name", "review"} <= set(fields):
                raise PlanError(f"{table}: has the columns {', '.join(fields) or 'none'}; give it name and review")
            return [(reader.line_num, line) for line in reader]
    except OSError as error:
        raise PlanError(f"{table}: cannot be read ({error.strerror}); give a CSV file") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise PlanError(f"{table}: is no CSV file in UTF-8 ({error}); save it as one") from error
