"""Bugs that do not crash, and the tests that notice them.

    python -m tests.silent_bugs                # put in every bug in turn, in a copy; caught or not
    python -m tests.silent_bugs NAME...        # these alone
    python -m tests.silent_bugs --list         # what they are, and what one would see

A trainer for RL seldom stops when it is wrong. It learns a little less, or something else. The bugs
here are of the kinds that real trainers have had. Each is an edit of one place of the program.
`tests` are the tests that must fail then: they look at what the program does and not at how it is
written. tests/test_silent_bugs.py puts in ten of them on every day.
"""
import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 120                             # seconds that the tests of one bug may take


@dataclass(frozen=True)
class Bug:
    name: str
    file: str
    old: str                            # stands in the file exactly once
    new: str
    seen: str                           # what one would see
    tests: tuple                        # the tests that must fail, as pytest names them


BUGS = []


def bug(name, file, old, new, seen, *tests):
    BUGS.append(Bug(name, file, old, new, seen, tuple(f"tests/{t}" for t in tests)))


# --------------------------------------------------------------------------------------------------
# Problems and rewards

bug("held-out problems in the pool", "run/problems.py",
    "draw_problems(task, count, rng, drawn, others)",
    "draw_problems(task, count, rng)",
    "Held-out accuracy is partly training accuracy: memorising looks like learning.",
    "test_train.py::test_no_held_out_problem_is_in_the_pool")

bug("held-out lines are trained on", "run/problems.py",
    "pool = [p for p in rows if p.prompt not in asked][:cfg.pool or None]",
    "pool = rows[:cfg.pool or None]",
    "Every held-out problem of a file is trained on as well.",
    "test_train.py::test_no_held_out_problem_is_in_the_pool")

bug("a task file ends the run as if all were well", "data/own.py",
    "except BaseException as e:\n        lines",
    "except Exception as e:\n        lines",
    "sys.exit(0) in a file of one's own: status 0, and nothing was learned.",
    "test_tasks.py::test_what_is_wrong_with_a_task_is_one_line")

bug("of two rope entries the last one counts", "hf/config.py",
    "if rope.setdefault(k, value) != value:",
    "if rope.update({k: value}):",
    "A model with linear scaling is computed without it: its answers are nearly right.",
    "test_hostile.py::test_configurations_that_are_refused")

bug("of two files with a tensor the last one counts", "hf/weights.py",
    "if twice := where.keys() & names.keys():",
    "if twice := {*()}:",
    "Old and new weights of a folder are mixed, as the names of the files have it.",
    "test_hostile.py::test_a_tensor_in_two_files_is_refused")

bug("the perfectible set keeps everything", "run/problems.py",
    "kept = [p for p, r in zip(pool, right) if low <= r / TRIES <= high]",
    "kept = list(pool)",
    "Many groups agree and teach nothing. Some problems can never be solved: 95 % is out of reach.",
    "test_train.py::test_the_perfectible_set_leaves_out_what_is_solved_always_or_never")

bug("every epoch in the same order", "run/problems.py",
    "stream(cfg.seed, 3, epoch)",
    "stream(cfg.seed, 3)",
    "A problem always meets the same others in its batch. Nothing looks wrong.",
    "test_train.py::test_batches_are_epochs_in_a_fresh_order")

bug("the first problems for ever", "train_rl.py",
    "state.drawn += cfg.prompts",
    "state.drawn += 0",
    "Every step asks the same problems. Accuracy climbs fast, and the others are never asked.",
    "test_train.py::test_dynamic_sampling_replaces_groups_that_agree")

bug("a graded answer belongs to another problem", "data/env.py",
    "problems[i // n], texts[i]",
    "problems[i % len(problems)], texts[i]",
    "Accuracy is low, although the samples read well: right answers to other questions.",
    "test_tasks.py::test_each_answer_is_graded_by_its_own_problem_and_cut_off_ones_are_wrong")

bug("truncated answers are rewarded", "data/env.py",
    "enumerate(rollout.stopped.tolist()) if stopped",
    "enumerate(rollout.stopped.tolist())",
    "The policy need not learn to stop: an answer that ran out of room counts as right.",
    "test_tasks.py::test_each_answer_is_graded_by_its_own_problem_and_cut_off_ones_are_wrong")

bug("the answer may stand anywhere", "data/addition.py",
    'text.partition("#")[2] == problem.answer',
    "problem.answer in text",
    "An answer is right that holds the result anywhere: in its working, or in a longer number.",
    "test_train.py::test_addition_worked_by_hand")

bug("a number may be used twice", "data/countdown.py",
    "sorted(used) == sorted(numbers)",
    "set(used) == set(numbers)",
    "Countdown is solved by rules that it does not have.",
    "test_graders.py::test_countdown")

bug("a minus sign is dropped", "data/gsm8k.py",
    '(-1 if found["sign"] == "-" else 1)',
    "1",
    "The grader takes -7 for 7. No metric shows it.",
    "test_graders.py::test_numbers_of_gsm8k")

bug("any word is a unit", "data/units.py",
    "all(word & known(question) for word in said)",
    "True",
    "An answer that is taken back, as in \"72 lies\", is paid for like one that stands.",
    "test_graders.py::test_gsm8k_takes_no_other", "test_graders.py::test_math_takes_no_other")

bug("a million is a unit", "data/units.py",
    "if NEVER & set().union(*said):",
    "if not said:",
    "5 million is 5 wherever the question speaks of millions.",
    "test_graders.py::test_gsm8k_takes_no_other",
    "test_graders.py::test_a_unit_is_of_the_questions_words_and_changes_nothing")

bug("a point is a number with thousands", "data/math_answers.py",
    "if not LIST.search(answer):",
    "if answer:",
    "The point (1,234) is 1234, and no metric shows it.",
    "test_graders.py::test_math_takes_no_other")

bug("a box inside of another is enough", "data/math_answers.py",
    'return None if BOX.sub("", around).strip("{} \\n$") else text[last:end].strip()',
    "return text[last:end].strip()",
    "One box with two numbers counts by the inner one.",
    "test_graders.py::test_gsm8k_takes_no_other", "test_graders.py::test_math_takes_no_other")

bug("an equation counts by its right side", "data/math_answers.py",
    """or "=" in said and "=" not in answer""",
    "",
    "7=5 is 5: a false equation that ends well is paid for.",
    "test_graders.py::test_math_takes_no_other")

bug("the demonstrator's stop token is masked", "run/base.py",
    "answer[i, start:len(row)] = row, True",
    "answer[i, start:len(row) - 1] = row, True",
    "The base never learns to stop: every answer is cut off, and no problem can be kept.",
    "test_train.py::test_demonstrations_are_trained_from_their_first_token_to_the_stop_token")

bug("the base's cache does not know the code", "run/base.py",
    'code=code(cfg, "run/base.py", "run/checkpoint.py"),',
    'code="",',
    "After an edit of the model the old base comes from the cache, as if nothing had changed.",
    "test_train.py::test_other_code_is_another_base")

# --------------------------------------------------------------------------------------------------
# Acting: the sampler and its random numbers

bug("each chunk of a rollout has the same noise", "train_rl.py",
    "                                      first + i))",
    "                                      first))",
    "Answers that are decoded in chunks repeat themselves: a problem asked twice has one answer.",
    "test_loop.py::test_no_two_answers_have_the_same_random_numbers")

bug("each chunk of an evaluation has the same noise", "sample.py",
    "temperature, seed, i)",
    "temperature, seed)",
    "Accuracy over many tries is as uncertain as over a few: the tries are not independent.",
    "test_train.py::test_a_score_does_not_depend_on_how_many_are_decoded_at_once")

bug("all answers of a group have the same noise", "data/__init__.py",
    "0, 0, i % samples, problems[i // samples]",
    "0, 0, 0, problems[i // samples]",
    "All answers to a problem are one: it is solved always or never, and no group has a signal.",
    "test_loop.py::test_no_two_answers_have_the_same_random_numbers")

bug("an answer's noise overlaps the next one's", "data/__init__.py",
    "0, 0, i % samples, problems[i // samples]",
    "i % samples, 0, 0, problems[i // samples]",
    "An answer is drawn with its neighbour's numbers, four places later. Nothing shows it.",
    "test_sample.py::test_noise_is_a_function_of_key_problem_sample_and_position_alone")

bug("every step has the same noise", "train_rl.py",
    "(cfg.seed, 7, step), again",
    "(cfg.seed, 7, 0), again",
    "A problem that comes again gets the same answers again, as far as the policy is the same.",
    "test_loop.py::test_no_two_answers_have_the_same_random_numbers")

bug("a group shares its noise", "sample.py",
    "uniforms(key, numbers, n, max_new_tokens))",
    "uniforms(key, numbers, 1, max_new_tokens).repeat(n, 1))",
    "All answers to a problem are one, and no group has a signal: |g| is 0.",
    "test_loop.py::test_no_two_answers_have_the_same_random_numbers")

bug("a second try has the noise of the first", "train_rl.py",
    "again * cfg.prompts",
    "0",
    "With dynamic sampling the new groups are drawn with the numbers of those they replace.",
    "test_loop.py::test_no_two_answers_have_the_same_random_numbers")

bug("every token of an answer has the same noise", "sample.py",
    "noise[t + 1] if row is everyone",
    "noise[0] if row is everyone",
    "An answer is drawn with one number: all its tokens are likely ones, or all are unlikely.",
    "test_sample.py::test_same_tokens_as_the_slow_way[cpu-equal-1.0]")

bug("rows that go on take the noise of others", "sample.py",
    "else noise[t + 1][row])",
    "else noise[t + 1][:len(row)])",
    "An answer depends on which others of its batch have ended: another batch, another answer.",
    "test_sample.py::test_same_tokens_as_the_slow_way[cpu-equal-0.6]")

bug("short prompts end in padding", "sample.py",
    "hidden[row // n, out.prompt_length - 1]",
    "hidden[row // n, -1]",
    "With prompts of several lengths, the first token of all but the longest is a guess.",
    "test_sample.py::test_same_tokens_as_the_slow_way[cpu-ragged-1.0]")

bug("all rows decode at the longest one's position", "sample.py",
    "ragged = bool((out.prompt_length != out.prompt_length[0]).any())",
    "ragged = False",
    "Short prompts see padding and a shifted position. The gap is large, for them alone.",
    "test_sample.py::test_same_tokens_as_the_slow_way[cpu-ragged-1.0]")

bug("a filter that training does not know", "sample.py",
    "logits = model.logits(hidden)                                           # (R, V)",
    "logits = model.logits(hidden)\n"
    "            logits = logits.masked_fill(logits < logits.topk(9).values[:, -1:], -math.inf)",
    "Recorded log-probs are too high by the log of the share that top-k left. kl is never near 0.",
    "test_sample.py::test_recorded_logprobs_are_the_teacher_forced_ones[cpu-fp32-1.0]")

bug("the stop token is thrown away", "sample.py",
    "live = is_stop.cumsum(0) - is_stop.long() == 0",
    "live = is_stop.cumsum(0) == 0",
    "No answer holds its stop token. The grader is content, and no gradient says when to stop.",
    "test_sample.py::test_masks_prompt_never_stop_token_always")

bug("rows that go on lose their place", "operators/graph.py",
    "self.position[:len(index)] = self.position[index]",
    "pass",
    "On a GPU, after half of the rows have ended, the others go on at positions of other rows.",
    "test_compiled.py::test_graph_steps_are_token_for_token_the_eager_ones[cpu-1.0-plain]")

bug("pass@k from the mean", "sample.py",
    "return 1.0 - math.comb(n - c, k) / math.comb(n, k)",
    "return 1.0 - (1.0 - c / n) ** k",
    "pass@k comes out too low, the more so the nearer k is to the number of tries.",
    "test_sample.py::test_pass_at_k_by_enumeration")

# --------------------------------------------------------------------------------------------------
# Temperature and log-probs: the same on both sides?

bug("training forgets the temperature", "train_rl.py",
    "where, cfg.temperature, replay)\n    every",
    "where, 1.0, replay)\n    every",
    "At temperature 1 all is well. At any other the ratio is wrong on every token.",
    "test_loop.py::test_a_temperature_counts_on_both_sides[rollout]")

bug("the recomputed policy forgets the temperature", "train_rl.py",
    "where, cfg.temperature, replay)\n        out[",
    "where, 1.0, replay)\n        out[",
    "At a temperature that is not 1 the clip acts before the policy has moved.",
    "test_loop.py::test_a_temperature_counts_on_both_sides[recomputed]")

bug("the rollout forgets the temperature", "train_rl.py",
    "cfg.group, env.answer_length, cfg.temperature, seed,",
    "cfg.group, env.answer_length, 1.0, seed,",
    "--temperature changes the loss and not the answers.",
    "test_loop.py::test_a_temperature_counts_on_both_sides[rollout]")

bug("the temperature divides log-probs", "precision.py",
    "torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)",
    "torch.log_softmax(logits, -1) / temperature",
    "Both sides agree, and the gap is small. But their probabilities do not add up to 1.",
    "test_sample.py::test_draw_hits_every_token_as_often_as_its_probability_says[cpu]")

bug("a gradient without its temperature", "precision.py",
    "None if d is None else d[s] / ctx.temperature",
    "None if d is None else d[s]",
    "At temperature 2 every gradient is twice as large as the loss says. Adam hides it.",
    "test_precision.py::test_logprob_and_entropy_have_the_gradients_of_fp64_autograd"
    "[cpu-fp32-one chunk]")

bug("raw log-probs are recorded", "precision.py",
    "return token, logp.gather(1, token[:, None])[:, 0]\n\n    def likeliest",
    "return token, self.log_softmax(logits).gather(1, token[:, None])[:, 0]\n\n    def likeliest",
    "The log-probs recorded are those before the temperature. At temperature 1 all is well.",
    "test_sample.py::test_draw_hits_every_token_as_often_as_its_probability_says[cpu]")

bug("rare tokens cannot be drawn", "precision.py",
    "piece[:, 0]].double().cumsum(-1)",
    "piece[:, 0]].cumsum(-1)",
    "In a large vocabulary many rare tokens are never sampled. Nothing shows it.",
    "test_sample.py::test_what_cannot_be_drawn[plain]")

bug("a token is scored by its own hidden state", "model.py",
    "targets = tokens[:, 1:].flatten()[rows]",
    "targets = tokens[:, :-1].flatten()[rows]",
    "A base learns to repeat its last token and solves nothing. With --model the gap is some nats.",
    "test_sample.py::test_recorded_logprobs_are_the_teacher_forced_ones[cpu-fp32-1.0]")

bug("replayed routes are one token off", "model.py",
    "replay[:, :tokens.shape[1] - 1]",
    "replay.roll(1, 1)[:, :tokens.shape[1] - 1]",
    "With --replay-routing the gap is half a nat: tokens go to their neighbours' experts.",
    "test_hf.py::test_replayed_routes_are_followed[cpu]")

# --------------------------------------------------------------------------------------------------
# The model and its cache

bug("a decoding row is one position ahead", "model.py",
    "cos, sin = self.cos[position][:, None], self.sin[position][:, None]",
    "cos, sin = self.cos[position + 1][:, None], self.sin[position + 1][:, None]",
    "With prompts of several lengths prefill and decoding disagree on where a token stands: a gap.",
    "test_model.py::test_ragged_rows_continue_at_their_own_positions[cpu-32-fp32]")

bug("a chunk's causal mask starts at the top left", "model.py",
    "device=tokens.device).tril_(start)",
    "device=tokens.device).tril_()",
    "Training shows nothing. Who feeds a cache several tokens at once loses most of what it read.",
    "test_model.py::test_cached_is_uncached[cpu-32-pieces-fp32]")

bug("attention sees the future", "precision.py",
    "is_causal=causal, enable_gqa",
    "is_causal=False, enable_gqa",
    "Imitation reads what it has to predict: its loss is 0.000, and its samples are nonsense.",
    "test_model.py::test_cached_is_uncached[cpu-32-one by one-fp32]")

bug("the cache is coarser than training", "model.py",
    "self.k[layer, :, :, self.length:end] = k\n",
    "self.k[layer, :, :, self.length:end] = k.bfloat16()\n",
    "In FP16 the gap is BF16's: decoding reads other keys than training.",
    "test_model.py::test_cached_is_uncached[cpu-32-one by one-fp32]")

bug("decoding shares the wrong key heads", "precision.py",
    "q.reshape(B, KV, -1, D), k, v, mask)\n            return self.down(y.reshape(B, H, 1, D))",
    "q.reshape(B, -1, KV, D).transpose(1, 2), k, v, mask)\n"
    "            return self.down(y.transpose(1, 2).reshape(B, H, 1, D))",
    "Another policy acts than learns: the gap is above 1, and accuracy falls.",
    "test_model.py::test_cached_is_uncached[cpu-32-one by one-fp32]")

bug("rotary pairs are neighbours", "precision.py",
    "a, b = self.up(x).chunk(2, -1)",
    "a, b = self.up(x)[..., ::2], self.up(x)[..., 1::2]",
    "A model from scratch learns as ever. A checkpoint of the hub talks nonsense.",
    "test_model.py::test_logits_of_every_variant_against_fp64[cpu-plain]")

bug("positions in BF16", "model.py",
    "torch.arange(cfg.context, dtype=torch.float64)[:, None]",
    "torch.arange(cfg.context).bfloat16().double()[:, None]",
    "Up to position 256 all is well. Beyond it neighbours stand at one place, on both sides alike.",
    "test_model.py::test_positions_far_out_are_told_apart")

bug("the embedding gets no gradient", "precision.py",
    "self.gain(F.embedding(tokens, w), F.embedding(tokens, self.weight(w)))",
    "self.gain(F.embedding(tokens, w.detach()), F.embedding(tokens, self.weight(w)))",
    "The embedding stays as it was at birth. Where it is the head too, half its gradient is lost.",
    "test_precision.py::test_gradients_against_fp64_autograd[cpu]")

bug("gains never learn", "precision.py",
    "return p + (r - p).detach() if torch.is_grad_enabled() else r.float()",
    "return p.detach() + (r - p).detach() if torch.is_grad_enabled() else r.float()",
    "Norms and embedding stay as they were at birth. The loss falls all the same.",
    "test_precision.py::test_operator_against_fp64[cpu-rms_norm-fp16]")

bug("the router gets no gradient", "model.py",
    "weight = p.gather(1, chosen)",
    "weight = p.detach().gather(1, chosen)",
    "Experts learn and the router does not: it stays as it was at birth.",
    "test_hf.py::test_gradients_of_experts_by_finite_differences[cpu]")

bug("an expert's output goes to another token", "model.py",
    "out = torch.cat(out)[torch.argsort(place)]",
    "out = torch.cat(out)[place]",
    "An answer depends on the others of its batch: a gap of a hundredth. It learns all the same.",
    "test_hf.py::test_logits_and_greedy_answers_of_every_family[cpu-qwen3 moe]")

bug("LoRA trains its base too", "model.py",
    "self.requires_grad_(False)",
    "self.requires_grad_(True)",
    "It learns faster than LoRA does. The saved adapter alone does not give the run's answers.",
    "test_hf.py::test_lora_keeps_one_rounded_base[cpu]")

bug("LoRA's scale is left out", "model.py",
    "return num.add(y, torch.cat(z, -1), self.scale)",
    "return num.add(y, torch.cat(z, -1))",
    "Adapters count half. Rollout and training agree; in another program the model is another one.",
    "test_model.py::test_an_adapter_adds_its_product")

# --------------------------------------------------------------------------------------------------
# Precision

bug("rounding towards zero", "precision.py",
    "bits += ((bits >> cut) & 1) + ((1 << (cut - 1)) - 1)",
    "bits += 0",
    "Emulated formats are half as exact as they say, and every number shrinks a little.",
    "test_precision.py::test_emulation_is_torchs_own_cast_on_every_16_bit_pattern[dtype0-5-10]")

bug("ties are rounded up", "precision.py",
    "bits += ((bits >> cut) & 1) + ((1 << (cut - 1)) - 1)",
    "bits += 1 << (cut - 1)",
    "Emulated numbers drift away from zero, by very little: only exact ties tell.",
    "test_precision.py::test_emulation_is_torchs_own_cast_on_every_16_bit_pattern[dtype0-5-10]")

bug("no subnormals", "precision.py",
    "torch.where(x.abs() < fmt.tiny, subnormal, y)",
    "torch.where(x.abs() < fmt.tiny, 0 * x, y)",
    "In emulated formats small gradients become 0 too early: the range is shorter than it says.",
    "test_precision.py::test_emulation_is_torchs_own_cast_on_every_16_bit_pattern[dtype0-5-10]")

bug("overflow saturates", "precision.py",
    "y.masked_fill_(y > fmt.max, math.inf).masked_fill_(y < -fmt.max, -math.inf)",
    "y.clamp_(-fmt.max, fmt.max)",
    "Emulated formats never overflow: the loss scale rises, and large gradients are cut off.",
    "test_precision.py::test_emulation_is_torchs_own_cast_on_every_16_bit_pattern[dtype0-5-10]")

bug("gradients are not rounded", "precision.py",
    "dx = ctx.num.round(dy)",
    "dx = dy.to(ctx.num.dtype)",
    "On a CPU, FP16 looks better than it is: what a GPU would lose is kept.",
    "test_precision.py::test_every_output_and_gradient_is_a_number_of_the_format[cpu-fp16-swiglu]")

bug("weight gradients in FP16", "precision.py",
    "dw = mm32(flat.t(), x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None\n",
    "dw = mm32(flat.t(), x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None\n"
    "        dw = None if dw is None else dw.half().float()\n",
    "Large gradients of weights overflow and small ones vanish, before they are added up.",
    "test_precision.py::test_operator_against_fp64[cpu-linear-fp32]")

bug("logits are rounded", "precision.py",
    "return mm32(h, self.weight(w).t())",
    "return self.round(mm32(h, self.weight(w).t()))",
    "Both sides round alike. But a log-prob is off by some hundredths in BF16, on both.",
    "test_precision.py::test_chunked_logprobs_are_the_whole_ones[cpu-fp16]")

bug("softmax in half precision", "precision.py",
    "y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)",
    "y = F.scaled_dot_product_attention(*(t.bfloat16() for t in (q, k, v)), mask,\n"
    "                                           is_causal=causal, enable_gqa=grouped).float()",
    "Training attends in BF16 and decoding does not: the gap is BF16's in every format.",
    "test_precision.py::test_operator_against_fp64[cpu-attention-fp32]")

bug("a norm's mean square in half precision", "precision.py",
    "return self.down(F.rms_norm(self.up(x), w.shape, self.gain(w), eps))",
    "x = self.up(x)\n"
    "        square = self.round(x.square().mean(-1, keepdim=True) + eps).float()\n"
    "        return self.down(x * square.rsqrt() * self.gain(w))",
    "A large activation makes the norm's output 0, since its square overflows. Others are less "
    "exact.",
    "test_precision.py::test_a_norm_of_large_numbers")

bug("another family's epsilon", "precision.py",
    "w.shape, self.gain(w), eps))",
    "w.shape, self.gain(w), 1e-5))",
    "A loaded checkpoint's log-probs are off by a little. Nothing else shows it.",
    "test_model.py::test_logits_of_every_variant_against_fp64[cpu-plain]")

bug("no loss scale", "precision.py",
    "enabled=num.fmt.needs_loss_scaling)",
    "enabled=False)",
    "In FP16 small gradients become 0. How many depends on the job: experiments.loss_scale counts.",
    "test_precision.py::test_small_gradients_underflow_without_a_scale_and_survive_with_one[cpu]")

bug("no master weights", "precision.py",
    "r.copy_(self.round(p))",
    "p.copy_(r.copy_(self.round(p)))",
    "An update of less than half a spacing is lost: with a small learning rate nothing moves.",
    "test_precision.py::test_updates_below_half_precision_are_kept_by_the_master")

bug("updated weights are not rounded", "precision.py",
    "r.copy_(self.round(p))",
    "r.copy_(p)",
    "On a CPU the weights are FP32's from the first update on. FP16 looks better than it is.",
    "test_precision.py::test_masters_stay_fp32_and_the_rounded_copy_keeps_its_address[cpu]")

bug("exact products of any number of rows", "operators/exact.py",
    "part = filled(part, rows, wide)",
    "part = filled(part, len(part), wide)",
    "--exact holds where rows fill whole slabs. With other numbers its self-test stops the run.",
    "test_exact.py::test_explain_finds_the_first_operator")

# --------------------------------------------------------------------------------------------------
# Advantages and losses

bug("the batch's mean for a group's", "algorithms.py",
    "torch.where(agree, 0.0, rewards - rewards.mean(1, keepdim=True))",
    "torch.where(agree, 0.0, rewards - rewards.mean())",
    "A right answer to an easy problem is worth as much as one to a hard problem.",
    "test_algorithms.py::test_advantages")

bug("the batch's deviation for a group's", "algorithms.py",
    "rewards.std(1, correction=0, keepdim=True) + 1e-8",
    "rewards.std(correction=0) + 1e-8",
    "In GRPO the rare right answer weighs no more than any other: all groups have one deviation.",
    "test_algorithms.py::test_advantages")

bug("an epsilon as large as the deviation", "algorithms.py",
    "keepdim=True) + 1e-8)",
    "keepdim=True) + 0.1)",
    "Advantages are about a fifth smaller, most of all where the group nearly agrees.",
    "test_algorithms.py::test_advantages")

bug("an answer is its own baseline", "algorithms.py",
    "return centred(rewards) * (rewards.shape[1] / (rewards.shape[1] - 1))",
    "return centred(rewards)",
    "RLOO's advantages are too small, by a factor of (G - 1) / G.",
    "test_algorithms.py::test_advantages")

bug("long answers are rewarded", "algorithms.py",
    "return -((lengths - (room - zone))",
    "return ((lengths - (room - zone))",
    "With --overlong an answer is rewarded for being long.",
    "test_algorithms.py::test_overlong_shaping")

bug("the policy gradient's sign", "algorithms.py",
    "return -t.A * t.logp\n",
    "return t.A * t.logp\n",
    "With --algo pg accuracy falls from the first steps on, to 0.",
    "test_algorithms.py::test_policy_gradient_and_k3")

bug("the clip's min for its max", "algorithms.py",
    "ratio, (low, high) = ratio_of(t.logp - t.logp_old), t.clip\n    return torch.maximum(",
    "ratio, (low, high) = ratio_of(t.logp - t.logp_old), t.clip\n    return torch.minimum(",
    "With one update a batch nothing shows. With several, what has moved far enough moves on.",
    "test_algorithms.py::test_clipped_ratio[1.5-1.0--1.2]")

bug("the clip's ends are exchanged", "algorithms.py",
    "ratio, (low, high) = ratio_of(t.logp - t.logp_old), t.clip\n",
    "ratio, (high, low) = ratio_of(t.logp - t.logp_old), t.clip\n",
    "With equal ends nothing shows. DAPO's clip-higher becomes a clip-lower.",
    "test_algorithms.py::test_the_two_ends_of_the_clip_are_apart")

bug("the ratio upside down", "algorithms.py",
    "ratio, (low, high) = ratio_of(t.logp - t.logp_old), t.clip\n",
    "ratio, (low, high) = ratio_of(t.logp_old - t.logp), t.clip\n",
    "The gradient has the wrong sign: accuracy falls to 0.",
    "test_algorithms.py::test_clipped_ratio[1.5-1.0--1.2]")

bug("GSPO's mean counts padding", "algorithms.py",
    "ratio_of(mean((t.logp - t.logp_old).detach(), t.mask))",
    "ratio_of((t.logp - t.logp_old).detach().mean(1, keepdim=True))",
    "An answer's ratio depends on how long the others of its micro-batch are.",
    "test_algorithms.py::test_one_ratio_for_an_answer")

bug("a gradient through CISPO's weight", "algorithms.py",
    ".detach().clamp(max=1 + t.clip[1])",
    ".clamp(max=1 + t.clip[1])",
    "Tokens whose log-prob is below -1 are pushed the wrong way.",
    "test_algorithms.py::test_a_cut_weight_keeps_its_gradient")

bug("the correction upside down", "algorithms.py",
    "correct(cfg.correction, acted - t.logp_rollout, t.mask)",
    "correct(cfg.correction, t.logp_rollout - acted, t.mask)",
    "The mismatch's bias is doubled in place of removed. Weights still average about 1.",
    "test_algorithms.py::test_which_ratio_the_weight_is_made_of")

bug("the correction weighs the wrong policy", "algorithms.py",
    "acted = t.logp_old if decoupled(cfg) else t.logp.detach()",
    "acted = t.logp.detach()",
    "With several updates a batch the ratio counts twice: as a ratio and as a weight.",
    "test_algorithms.py::test_which_ratio_the_weight_is_made_of")

bug("what is outside the band is cut, not left out", "algorithms.py",
    "return rho * kept, kept",
    "return rho.clamp(low, high), kept | True",
    "MIS is TIS. The share of tokens kept is always 1.",
    "test_algorithms.py::test_corrections[token-mis-want3]")

bug("rejected answers stay in the denominator", "algorithms.py",
    "device=kept.device), kept.any(1).float()",
    "device=kept.device), torch.ones(len(kept), device=kept.device)",
    "The more a correction rejects, the smaller the learning rate.",
    "test_algorithms.py::test_rejected_tokens_leave_the_denominator[dr-grpo-seq-mis--0.8]")

bug("DAPO divides by answers", "algorithms.py",
    "device=kept.device), kept.sum(1).float()",
    "device=kept.device), kept.any(1).float()",
    "The loss is larger by the answers' mean length. Adam hides it; more gradients are clipped.",
    "test_algorithms.py::test_averages")

bug("the KL estimator's sign", "algorithms.py",
    "d = (logp_ref - logp).clamp(-20, 20)",
    "d = (logp - logp_ref).clamp(-20, 20)",
    "The penalty is never negative, and 0 at the reference, as it should be. But it is not the KL.",
    "test_algorithms.py::test_policy_gradient_and_k3")

bug("the KL penalty is a bonus", "algorithms.py",
    "weight * algorithm.loss(t) + cfg.kl_beta * penalty",
    "weight * algorithm.loss(t) - cfg.kl_beta * penalty",
    "With --kl-beta the policy is paid for leaving its base.",
    "test_train.py::test_a_penalty_pulls_towards_the_reference")

bug("k1 for k3", "algorithms.py",
    "return torch.expm1(d) - d",
    "return -d",
    "The penalty may be negative. Its gradient has the mean 0: it pulls nowhere.",
    "test_algorithms.py::test_policy_gradient_and_k3")

# --------------------------------------------------------------------------------------------------
# One step: groups, micro-batches, updates

bug("groups are cut the wrong way", "train_rl.py",
    "torch.tensor(env.rewards(asked, rollout)).view(-1, cfg.group)",
    "torch.tensor(env.rewards(asked, rollout)).view(cfg.group, -1).T",
    "An answer is compared with answers to other problems. Accuracy falls, slowly.",
    "test_train.py::test_dynamic_sampling_replaces_groups_that_agree")

bug("advantages of other answers", "train_rl.py",
    "batch.advantage[part], reference",
    "batch.advantage[:len(part)], reference",
    "Micro-batches are sorted by length, advantages are not. Accuracy falls, slowly.",
    "test_train.py::test_micro_batches_and_skipped_groups_leave_the_gradient_alone[dr-grpo]")

bug("a micro-batch as long as its shortest answer", "train_rl.py",
    "yield part, int(length[part[-1]])",
    "yield part, int(length[part[0]])",
    "Long answers lose their ends, with the stop token. The largest gap is several nats.",
    "test_train.py::test_micro_batches_and_skipped_groups_leave_the_gradient_alone[dr-grpo]")

bug("gradients are never added", "train_rl.py",
    "                with reproducible(device):\n                    scaler",
    "                model.zero_grad(set_to_none=True)\n"
    "                with reproducible(device):\n                    scaler",
    "Of a batch in parts the last part counts alone: |g| is small, and accuracy rises slowly.",
    "test_train.py::test_micro_batches_and_skipped_groups_leave_the_gradient_alone[dr-grpo]")

bug("accumulated gradients are divided twice", "train_rl.py",
    "scaler.scale(part_loss / divisor).backward()",
    "scaler.scale(part_loss / divisor * len(part) / len(rows)).backward()",
    "Smaller micro-batches learn more slowly. Adam hides it, gradient clipping acts less.",
    "test_train.py::test_micro_batches_and_skipped_groups_leave_the_gradient_alone[dr-grpo]")

bug("the stop token counts as padding", "train_rl.py",
    "return Tokens(where, padded(logp, where)",
    "stop = torch.arange(end, device=where.device) == r.length[part, None] - 1\n"
    "    return Tokens(where & ~stop, padded(logp, where)",
    "No gradient says when to stop. kept_share is a little below 1.",
    "test_train.py::test_micro_batches_and_skipped_groups_leave_the_gradient_alone[dr-grpo]")

bug("groups that agree leave the denominator", "train_rl.py",
    "divisor, loss = denominator(model, batch, rows, cfg, room), 0.0",
    "some = rows[batch.advantage[rows] != 0]\n"
    "    divisor, loss = denominator(model, batch, some, cfg, room), 0.0",
    "The nearer the goal, the larger the gradient: the last groups with signal count for all.",
    "test_train.py::test_micro_batches_and_skipped_groups_leave_the_gradient_alone[dr-grpo]")

bug("answers without advantage feel no penalty", "train_rl.py",
    "has_signal = (batch.advantage[rows] != 0) | (not checks.idle(cfg))",
    "has_signal = batch.advantage[rows] != 0",
    "The KL penalty acts on half of the answers: kl to base is larger than it was asked to be.",
    "test_train.py::test_a_penalty_pulls_towards_the_reference")

bug("the ratio compares the policy with itself", "train_rl.py",
    "batch.logp_old if decoupled(cfg) else r.logp, batch",
    "batch.logp_old if decoupled(cfg) else None, batch",
    "The ratio is 1 on every token. Nothing corrects the mismatch, and the clip never acts.",
    "test_train.py::test_micro_batches_and_skipped_groups_leave_the_gradient_alone[dr-grpo]")

bug("the old policy is asked after it has moved", "train_rl.py",
    "if cfg.updates_per_batch == 1 or not (decoupled(cfg) or cfg.exact):",
    "if cfg.updates_per_batch >= 1:",
    "With several updates a batch the ratio is 1 at each of them, and the clip never acts.",
    "test_loop.py::test_the_old_policy_is_the_one_before_the_first_update")

bug("rejected by the new policy", "train_rl.py",
    "known = batch.logp_old if decoupled(cfg) else None",
    "known = None",
    "With several updates a batch the denominator counts other tokens than the loss.",
    "test_train.py::test_what_is_rejected_is_known_before_the_backward_pass"
    "[7-dr-grpo at a later one]")

bug("every update sees the whole batch", "train_rl.py",
    "env.answer_length, rows=rows)",
    "env.answer_length, rows=every)",
    "--updates-per-batch 4 means four epochs over the batch: it takes four times as long.",
    "test_loop.py::test_each_answer_is_learned_from_once_a_step")

bug("the KL's reference is the policy itself", "train_rl.py",
    "score(reference or model, batch, cfg)",
    "score(model, batch, cfg)",
    "kl to base is 0 for ever, and the policy goes wherever it likes.",
    "test_loop.py::test_the_reference_is_the_policy_before_rl[all weights]")

bug("LoRA's reference has the adapters on", "train_rl.py",
    "model.adapters(False)",
    "model.adapters(True)",
    "With LoRA, kl to base is 0 for ever: the reference learns as well.",
    "test_loop.py::test_the_reference_is_the_policy_before_rl[adapters]")

bug("clipping before unscaling", "train_rl.py",
    "    scaler.unscale_(optimizer)               # clipping a scaled gradient would clip the "
    "wrong thing\n"
    "    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)\n",
    "    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)\n"
    "    scaler.unscale_(optimizer)\n",
    "|g| is in the thousands, and each gradient is clipped to almost nothing. Adam hides it.",
    "test_train.py::test_an_update_is_as_long_as_the_clipped_gradient_whatever_the_loss_scale")

bug("gradients are not clipped", "train_rl.py",
    "clip_grad_norm_(model.parameters(), GRAD_CLIP)",
    "clip_grad_norm_(model.parameters(), math.inf)",
    "All is well until one batch has a gradient a hundred times as large as the others.",
    "test_train.py::test_an_update_is_as_long_as_the_clipped_gradient_whatever_the_loss_scale")

bug("the loss scale never moves", "train_rl.py",
    "        scaler.update()\n",
    "        scaler.update(before)\n",
    "If the first scale is too large, every update is skipped. Accuracy stands still.",
    "test_train.py::test_an_overflow_is_skipped_and_changes_no_weight")

bug("gradients of older steps are kept", "train_rl.py",
    "    optimizer.zero_grad(set_to_none=True)\n",
    "",
    "A loss scale hides it. Without one |g| grows, and each step goes where those before it went.",
    "test_train.py::test_an_update_of_which_nothing_is_kept_moves_nothing")

bug("the learning rate is never set", "train_rl.py",
    'group["lr"] = lr\n    before',
    'pass\n    before',
    "The line says that the rate rises and falls. It stays at its peak.",
    "test_train.py::test_an_update_is_as_long_as_the_clipped_gradient_whatever_the_loss_scale")

bug("the schedule counts rollouts", "train_rl.py",
    "updates / (cfg.steps * cfg.updates_per_batch)",
    "updates / cfg.steps",
    "With four updates a batch the learning rate is 0 after a quarter of the run.",
    "test_train.py::test_learning_rate_rises_then_falls_to_zero")

bug("skipped updates use up the schedule", "train_rl.py",
    "state.updates += not skipped",
    "state.updates += 1",
    "While the loss scale settles the warm-up passes by: the first real update is a large one.",
    "test_loop.py::test_a_skipped_update_uses_up_no_learning_rate")

bug("neither side sees an update", "train_rl.py",
    "                    num.refresh()           # once per update, in place, for both sides\n",
    "                    pass\n",
    "Accuracy stands still. The gap stays small, for both sides are stale alike.",
    "test_loop.py::test_both_sides_compute_with_the_newest_weights[fp16]")

bug("the rollout keeps its first weights", "train_rl.py",
    "for num in {acting, learning}:\n                    num.refresh()",
    "for num in {learning}:\n                    num.refresh()",
    "With one format all is well. With two accuracy stands still, and the gap grows.",
    "test_loop.py::test_both_sides_compute_with_the_newest_weights[two formats]")

bug("training keeps its first weights", "train_rl.py",
    "for num in {acting, learning}:\n                    num.refresh()",
    "for num in {acting}:\n                    num.refresh()",
    "With one format all is well. With two accuracy climbs, then collapses, and the gap grows.",
    "test_loop.py::test_both_sides_compute_with_the_newest_weights[two formats]")

# --------------------------------------------------------------------------------------------------
# A GPU's graphs

bug("the rounded weights move", "precision.py",
    "                r.copy_(self.round(p))",
    "                self._rounded[p] = self.round(p)",
    "A CUDA graph goes on with the weights of its recording: the gap grows with every step.",
    "test_gpu.py::test_a_replayed_step_is_the_step[native-fp16-plain]")

bug("recording a step counts as a step", "operators/graph.py",
    "for t in (self.token, self.position)]",
    "for t in (self.token,)]",
    "On a GPU, each recording leaves out two positions. The answers look almost right.",
    "test_gpu.py::test_a_replayed_step_is_the_step[native-fp16-plain]")

bug("a graph's cache keeps old numbers", "operators/graph.py",
    "        self.cache.k.zero_(), self.cache.v.zero_()     # masked slots weigh 0, and 0 times inf is NaN\n",
    "",
    "After one overflow, all later rollouts on a GPU are NaN.",
    "test_gpu.py::test_what_an_overflow_left_in_the_cache_is_gone[cpu]")

# --------------------------------------------------------------------------------------------------
# What is measured, and what a resumed run remembers

bug("accuracy on chosen groups", "train_rl.py",
    "seen[groups], seen)",
    "seen[groups], seen[groups])",
    "With dynamic sampling accuracy comes out too low: groups in which all is right are left out.",
    "test_train.py::test_dynamic_sampling_replaces_groups_that_agree")

bug("accuracy on what is learned from", "run/meter.py",
    "accuracy=(b.seen == 1)",
    "accuracy=(b.rewards == 1)",
    "With dynamic sampling accuracy comes out too low: groups in which all is right are left out.",
    "test_loop.py::test_accuracy_counts_every_answer_of_the_step")

bug("the sign of the mismatch", "run/meter.py",
    "d = (logp_rollout - logp_train).double()",
    "d = (logp_train - logp_rollout).double()",
    "kl_k1 and seq_kl are negative on average, which no KL is. The gap is the same.",
    "test_precision.py::test_mismatch_on_numbers_worked_by_hand")

bug("the loss scale is not saved", "run/folder.py",
    "scaler=scaler.state_dict()",
    "scaler={}",
    "A resumed run skips its first updates, as a new one does.",
    "test_loop.py::test_a_resumed_run_is_the_whole_run")

bug("the optimizer starts again", "run/folder.py",
    'optimizer.load_state_dict(saved["optimizer"])',
    "pass",
    "After a resume Adam's moments are 0: its first step moves every weight by the learning rate.",
    "test_loop.py::test_a_resumed_run_is_the_whole_run")

bug("the noise starts again", "train_rl.py",
    "batch = act(sampler, env, state, cfg, step)",
    "batch = act(sampler, env, state, cfg, step - first)",
    "A resumed run draws its answers with the numbers of its first steps.",
    "test_loop.py::test_a_resumed_run_is_the_whole_run")

bug("the problems start again", "run/folder.py",
    "    state.problems = [Problem(*p) for p in state.problems]\n",
    "    state.problems, state.drawn = [Problem(*p) for p in state.problems], 0\n",
    "A resumed run asks the first problems of the epoch again, and the last ones later or never.",
    "test_loop.py::test_a_resumed_run_is_the_whole_run")

bug("the reference starts again", "run/base.py",
    'saved["reference"] if saved else model.state_dict()',
    "model.state_dict()",
    "After a resume kl to base is 0: the penalty pulls to where the run was interrupted.",
    "test_loop.py::test_a_resumed_run_is_the_whole_run")

bug("two runs in one folder", "run/folder.py",
    'raise InputError(f"another run is at work in {self.path}") from None',
    "pass",
    "Two runs write their lines into one log and their checkpoints over each other.",
    "test_ends.py::test_a_folder_belongs_to_one_run")

bug("a cluster's SIGTERM ends a run at once", "run/folder.py",
    "for n in (signal.SIGINT, *ENDING):",
    "for n in (signal.SIGINT,):",
    "A machine that is taken back costs all steps since the last checkpoint.",
    "test_ends.py::test_a_signal_ends_the_step_and_a_second_one_the_run")

bug("a grader that always fails", "data/guard.py",
    "if self.failures >= FAILURES:",
    "if False:",
    "Every answer gets 0, and the run goes on to its end.",
    "test_ends.py::test_a_grader_that_always_fails_ends_the_run")

bug("a grader that fails often", "data/guard.py",
    "self.failures = 0 if isinstance(found, float) else self.failures + 1",
    "self.failures += not isinstance(found, float)",
    "A long run with a few answers that no grader can read ends in an error after hours.",
    "test_ends.py::test_one_that_fails_often_does_not")

bug("libraries that others wrote", "operators/compiled.py",
    " or about.st_mode & 0o022",
    "",
    "In a shared cache another user's code runs as you.",
    "test_systems.py::test_a_library_that_others_can_write_to_is_not_loaded")

bug("answers in parts repeat themselves", "sample.py",
    "new, a.temperature, a.seed, i)",
    "new, a.temperature, a.seed)",
    "Of many answers to a prompt every 513th is the first one again: the variety is made up.",
    "test_sample.py::test_many_answers_come_in_parts")

bug("the report begins with the smallest mismatch", "report/page.py",
    'key=lambda w: -abs(float(w["mu"])',
    'key=lambda w: abs(float(w["mu"])',
    "The first row is the token that agrees best, of the run's worst ones none is shown.",
    "test_report.py::test_failures_come_first_and_the_worst_token_too")

bug("a model's text is markup", "report/page.py",
    "return html.escape(shown, quote=True)",
    "return shown",
    "An answer with a tag in it is not shown, or runs in the reader's browser.",
    "test_report.py::test_what_a_model_writes_is_text")

bug("a resumed run keeps lines of steps it does again", "run/folder.py",
    "        self.rewind(step)\n",
    "",
    "The curves double back: some steps stand in the log twice, with different numbers.",
    "test_loop.py::test_a_resumed_run_is_the_whole_run")


# --------------------------------------------------------------------------------------------------
# Putting one in, and running its tests


def mutated(bug):
    """The file's text with the bug in it."""
    text = (ROOT / bug.file).read_text(encoding="utf-8")
    found = text.count(bug.old)
    if found != 1:
        raise LookupError(f"{bug.name}: {bug.file} has {found} times, and not once: {bug.old!r}")
    return text.replace(bug.old, bug.new)


def copy_of_the_tree(folder):
    """All files that git knows, as they are here, into `folder`."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith("results/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


@contextmanager
def put_in(bug, folder):
    """The copy in `folder` has the bug, for a while."""
    (folder / bug.file).write_text(mutated(bug), encoding="utf-8")
    try:
        yield
    finally:
        shutil.copy(ROOT / bug.file, folder / bug.file)


def run_tests(folder, tests, limit=LIMIT):
    """-> whether all passed (None: they did not run to their end), and what pytest said. In a
    process and with a cache of their own, on one core, with the operators that one reads."""
    # No .pyc: Python tells a new source by size and second, and bugs come faster than that.
    env = {**os.environ, "TENBIT_CACHE": str(folder / ".cache"), "TENBIT_FAST": "0",
           "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-x", "--tb=short",
               "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0", *tests]
    try:
        p = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, timeout=limit,
                           stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    except subprocess.TimeoutExpired:
        return None, f"no end within {limit} s"
    return {0: True, 1: False}.get(p.returncode), p.stdout


def sound(folder, bugs):
    """The tests of these bugs pass as long as there is no bug; else what pytest says. A test that
    fails anyway catches nothing."""
    passed, said = run_tests(folder, sorted({t for b in bugs for t in b.tests}), 5 * LIMIT)
    return "" if passed else said


def outcome(folder, bug):
    """-> whether it was caught, seconds, what pytest said."""
    begin = time.time()
    with put_in(bug, folder):
        passed, said = run_tests(folder, bug.tests)
    return passed is False, time.time() - begin, said


def main(argv=None):
    p = argparse.ArgumentParser(prog="tests.silent_bugs", description=__doc__.split("\n\n")[0])
    p.add_argument("name", nargs="*", help="bugs whose names hold this text (default: all)")
    p.add_argument("--list", action="store_true", help="names, and what one would see")
    a = p.parse_args(argv)
    bugs = [b for b in BUGS if not a.name or any(n in b.name for n in a.name)]
    if not bugs:
        p.error(f"no bug has {' or '.join(map(repr, a.name))} in its name; --list has them all")
    if a.list:
        for b in bugs:
            print(f"{b.name}  ({b.file})\n    {b.seen}")
        return 0
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        copy_of_the_tree(folder)
        if said := sound(folder, bugs):
            print(f"{said}\nthese tests fail without a bug: they would catch nothing")
            return 1
        for b in bugs:
            try:
                caught, seconds, said = outcome(folder, b)
            except LookupError as e:
                caught, seconds, said = False, 0.0, str(e)
            missed += not caught
            word = "caught" if caught else "NOT CAUGHT"
            print(f"{word:10}  {seconds:5.1f} s  {b.name}", flush=True)
            if not caught:
                print(said, flush=True)
    print(f"{len(bugs) - missed} of {len(bugs)} bugs caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
