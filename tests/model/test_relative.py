"""Buckets against the table of the original and against transformers."""

import math

import numpy as np
import pytest
import torch
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from ds_deberta.model import DebertaConfig
from ds_deberta.model.relative import log_bucket, slot_table

# For 256 buckets and 512 positions, as the original computes them: the first distance of each
# bucket beyond 128, as distance:bucket. A bucket lasts until the next starts, the last to 511.
ORIGINAL = """
129:129 130:130 131:131 133:132 134:133 136:134 137:135 139:136 140:137 142:138 143:139 145:140
146:141 148:142 150:143 151:144 153:145 155:146 156:147 158:148 160:149 161:150 163:151 165:152
167:153 169:154 170:155 172:156 174:157 176:158 178:159 180:160 182:161 184:162 186:163 188:164
190:165 192:166 194:167 196:168 198:169 201:170 203:171 205:172 207:173 210:174 212:175 214:176
216:177 219:178 221:179 224:180 226:181 229:182 231:183 234:184 236:185 239:186 241:187 244:188
247:189 249:190 252:191 255:192 258:193 260:194 263:195 266:196 269:197 272:198 275:199 278:200
281:201 284:202 287:203 290:204 294:205 297:206 300:207 303:208 307:209 310:210 313:211 317:212
320:213 324:214 327:215 331:216 335:217 338:218 342:219 346:220 349:221 353:222 357:223 361:224
365:225 369:226 373:227 377:228 381:229 385:230 390:231 394:232 398:233 403:234 407:235 411:236
416:237 420:238 425:239 430:240 434:241 439:242 444:243 449:244 454:245 459:246 464:247 469:248
474:249 479:250 484:251 490:252 495:253 500:254 506:255
"""


def tiny(**changes) -> DebertaConfig:
    return DebertaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, **changes)


def original_bucket(distance: int) -> int:
    size = min(abs(distance), 511)
    starts = {int(pair.split(":")[0]): int(pair.split(":")[1]) for pair in ORIGINAL.split()}
    bucket = size if size < 129 else starts[max(start for start in starts if start <= size)]
    return bucket if distance > 0 else -bucket


def test_buckets_equal_the_original_table_up_to_distance_4096():
    for distance in range(-4096, 4097):
        bucket = log_bucket(distance, num_buckets=256, max_distance=512)
        assert bucket == original_bucket(distance), distance


def test_slots_are_buckets_moved_up_by_256():
    slots = slot_table(tiny(), 4097)
    assert slots.dtype == torch.int64
    assert slots.shape == (2 * 4097 - 1,)
    expected = [original_bucket(delta) + 256 for delta in range(-4096, 4097)]
    assert slots.tolist() == expected
    assert slots.min() == 1  # the original never uses row 0
    assert slots.max() == 511


@pytest.mark.parametrize(("buckets", "reach"), [(256, 512), (32, 128), (64, 512), (320, 1024)])
def test_buckets_equal_those_of_transformers_within_reach(buckets: int, reach: int):
    deltas = torch.arange(-(reach - 1), reach)
    theirs = make_log_bucket_position(deltas, buckets, reach).long()
    config = tiny(position_buckets=buckets, max_relative_positions=reach)
    assert torch.equal(slot_table(config, reach), theirs + buckets)


def test_no_bucket_starts_so_near_a_distance_that_rounding_could_move_it():
    distances = np.arange(129, 511, dtype=np.float64)
    place = np.log(distances / 128) / math.log(511 / 128) * 127
    assert np.abs(place - np.round(place)).min() > 1e-4  # fp32 errs by less than 1e-4 here


def test_without_buckets_each_distance_has_its_row():
    slots = slot_table(tiny(position_buckets=-1, max_relative_positions=4), 7)
    # deltas  -6 -5 -4 -3 -2 -1  0  1  2  3  4  5  6
    assert slots.tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7]


@pytest.mark.parametrize("buckets", [256, 32, -1])
def test_slots_rise_without_gaps_wider_than_the_rows_between_their_ends(buckets: int):
    slots = slot_table(tiny(position_buckets=buckets), 512)
    assert (slots.diff() >= 0).all()
    for length in (1, 2, 100, 512):
        used = slots[512 - length : 511 + length]
        assert used[0] == used.min()
        assert used[-1] == used.max()
