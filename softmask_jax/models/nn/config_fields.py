"""Checks of other libraries' config files: entries that are set must be read, built or known to be harmless."""
from collections.abc import Collection, Mapping

# Entries that transformers writes for any model: names, labels, outputs, generation.
TRANSFORMERS = frozenset("""
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation
    auto_map bos_token_id chunk_size_feed_forward decoder_start_token_id dtype eos_token_id finetuning_task id2label
    initializer_range label2id model_type name_or_path num_labels output_attentions output_hidden_states pad_token_id
    prefix problem_type return_dict sep_token_id task_specific_params tokenizer_class torch_dtype torchscript
    transformers_version use_cache
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
""".split())


def is_off(value) -> bool:
    """Whether an entry is null, false or empty."""
    return value is None or value is False or (isinstance(value, (str, list, tuple, dict)) and not value)


def check_values(config: Mapping, file: str, values: Mapping[str, tuple]) -> None:
    """ValueError for an entry with a value that is not built; missing and null ones pass."""
    for name, built in values.items():
        value = config.get(name)
        # 1 == True, but is no boolean.
        same = [one for one in built if value == one and (type(value) is bool) == (type(one) is bool)]
        if value is not None and not same:
            raise ValueError(f"{file} has {name} = {value!r:.60}; only {' or '.join(map(repr, built))} is built here.")


def check_unknown(config: Mapping, file: str, known: Collection[str]) -> None:
    """ValueError naming all entries that are set but unknown."""
    unknown = [f"{name} = {value!r:.40}" for name, value in config.items() if name not in known and not is_off(value)]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ValueError(
            f"{file} has {', '.join(unknown[:5])}{more}, which is not built here; if that changes nothing in what the "
            "weights mean, set it to null there."
        )
