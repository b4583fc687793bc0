"""Puts other labels into a dataset whose other columns, format and transform stay as they are."""

import datasets
import numpy as np
import pyarrow as pa

from .labels import is_list


def with_labels(
    dataset: datasets.Dataset, column: str, labels: np.ndarray, kept_as: str | None = None
) -> datasets.Dataset:
    """
    A new dataset with other labels. Nothing is decoded, and no transform runs.

    Args:
        dataset (`datasets.Dataset`): The dataset.
        column (`str`): The label column, stored as `[N]` or `[N, 1]`. It keeps its place and its feature type.
        labels (`np.ndarray` of shape `[N]`): The label of each row.
        kept_as (`str`, *optional*): The name of a new last column for the labels that were there.
    """
    feature = dataset.features[column]
    # Arrow in, arrow out. Nothing is decoded, not even where add_column writes a shuffled dataset out.
    # A dataset without any column would forget its number of rows, so the old labels go last.
    old = "".join(["old ", *dataset.column_names]) if kept_as is None else kept_as
    result = dataset.with_format("arrow").rename_column(column, old)
    result = result.add_column(column, _as_arrow_column(labels, feature), feature=feature)
    result = result.select_columns([*dataset.column_names, *([] if kept_as is None else [kept_as])])
    _copy_format(dataset, result)
    return result


def _as_arrow_column(labels: np.ndarray, feature: object) -> pa.Array:
    arrow_type = datasets.Features({"labels": feature}).arrow_schema.field("labels").type
    if is_list(arrow_type):
        return pa.array([[label] for label in labels], type=arrow_type)
    return pa.array(labels).cast(arrow_type)


def _copy_format(source: datasets.Dataset, target: datasets.Dataset) -> None:
    source_format = source.format
    # `select` sorts the names of the formatted columns.
    every_column = set(source_format["columns"]) == set(source.column_names)
    target.set_format(
        type=source_format["type"],
        columns=None if every_column else source_format["columns"],
        output_all_columns=source_format["output_all_columns"],
        **source_format["format_kwargs"],
    )
