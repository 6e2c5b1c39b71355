// A decode step of one attention layer through the C interface, by a program without Python or torch: norm, a GPTQ
// weight packed from its checkpoint, rotary embedding, cache, attention over blocks that lie in any order, and the next
// token. Each result is held against loops in double.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

#include "teco_kernels.h"

namespace {

constexpr int kThreads = 2;
constexpr int64_t kHidden = 64, kHeads = 4, kKvHeads = 2, kHeadDim = 16, kVocab = 1000;
constexpr int64_t kBlockSize = 4, kNumBlocks = 8, kContext = 13;
constexpr int64_t kQkv = (kHeads + 2 * kKvHeads) * kHeadDim;
constexpr float kEps = 1e-5f;

void require(TecoStatus status) {
  if (status == TECO_OK) return;
  std::fprintf(stderr, "status %d: %s\n", static_cast<int>(status), teco_last_error());
  std::exit(1);
}

void expect_close(const char* what, double got, double expected) {
  if (std::fabs(got - expected) <= 1e-5 * (1 + std::fabs(expected))) return;
  std::fprintf(stderr, "%s: expected %.9g, got %.9g\n", what, expected, got);
  std::exit(1);
}

uint32_t next_word() {
  static uint32_t state = 1;
  return state = state * 1664525u + 1013904223u;
}

std::vector<float> random_floats(int64_t count, float scale = 1.f) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = scale * (static_cast<float>(next_word() >> 8) / (1 << 23) - 1);
  return values;
}

// A 4-bit checkpoint of 64 inputs in two groups of 32, and what its weights are.
struct Checkpoint {
  static constexpr int64_t kGroups = 2;
  std::vector<uint32_t> qweight = std::vector<uint32_t>(kHidden / 8 * kQkv);
  std::vector<uint32_t> qzeros = std::vector<uint32_t>(kGroups * kQkv / 8);
  std::vector<uint16_t> scales = std::vector<uint16_t>(kGroups * kQkv, 0x2c00);  // 1/16

  Checkpoint() {
    for (uint32_t& word : qweight) word = next_word();
    for (uint32_t& word : qzeros) word = next_word();
  }
  double weight(int64_t input, int64_t output) const {
    const uint32_t code = qweight[input / 8 * kQkv + output] >> input % 8 * 4 & 15;
    const uint32_t zero = qzeros[(input / 32 * kQkv + output) / 8] >> output % 8 * 4 & 15;
    return (static_cast<double>(code) - (zero + 1)) / 16;
  }
  TecoGptqCheckpoint view() const {
    TecoGptqCheckpoint c = {};
    c.qweight = qweight.data();
    c.qzeros = qzeros.data();
    c.scales = scales.data();
    c.in_features = kHidden;
    c.out_features = kQkv;
    c.num_groups = kGroups;
    c.bits = 4;
    c.stores_zero_minus_one = true;
    return c;
  }
};

std::vector<float> norm(const std::vector<float>& hidden, const std::vector<float>& weight) {
  std::vector<float> out(kHidden);
  TecoRmsNormParams p = {};
  p.out = out.data();
  p.input = hidden.data();
  p.weight = weight.data();
  p.num_rows = p.inner_rows = 1;
  p.hidden_size = p.input_stride = p.out_stride = kHidden;
  p.eps = kEps;
  p.dtype = TECO_FLOAT32;
  require(teco_rms_norm(&p, kThreads));

  double mean_square = 0;
  for (float x : hidden) mean_square += static_cast<double>(x) * x / kHidden;
  for (int64_t i = 0; i < kHidden; ++i)
    expect_close("rms_norm", out[i], hidden[i] * weight[i] / std::sqrt(mean_square + kEps));
  return out;
}

std::vector<float> multiply(const std::vector<float>& input, const Checkpoint& checkpoint) {
  const TecoGptqCheckpoint view = checkpoint.view();
  TecoGptqPackedSize size;
  require(teco_gptq_packed_size(&view, &size));
  std::vector<uint8_t> packed(static_cast<size_t>(size.weight_bytes));
  require(teco_gptq_pack(&view, packed.data(), nullptr));  // once, when the model is loaded

  std::vector<float> out(kQkv);
  TecoGptqMatmulParams p = {};
  p.out = out.data();
  p.input = input.data();
  p.weight = packed.data();
  p.num_rows = 1;
  p.in_features = p.input_stride = kHidden;
  p.out_features = p.out_stride = kQkv;
  p.num_groups = view.num_groups;
  p.blocks_per_group = size.blocks_per_group;
  p.bits = view.bits;
  p.dtype = TECO_FLOAT32;
  require(teco_gptq_matmul(&p, kThreads));

  for (int64_t n = 0; n < kQkv; ++n) {
    double sum = 0;
    for (int64_t k = 0; k < kHidden; ++k) sum += input[k] * checkpoint.weight(k, n);
    expect_close("gptq_matmul", out[n], sum);
  }
  return out;
}

void rotate(std::vector<float>& qkv, int64_t position) {
  constexpr int64_t kHalf = kHeadDim / 2;
  std::vector<float> cos_sin(kContext * kHeadDim);
  for (int64_t p = 0; p < kContext; ++p)
    for (int64_t i = 0; i < kHalf; ++i) {
      const double angle = static_cast<double>(p) * std::pow(10000., -static_cast<double>(i) / kHalf);
      cos_sin[p * kHeadDim + i] = static_cast<float>(std::cos(angle));
      cos_sin[p * kHeadDim + kHalf + i] = static_cast<float>(std::sin(angle));
    }
  const std::vector<float> before = qkv;
  TecoRotaryEmbeddingParams p = {};
  p.positions = &position;
  p.query = qkv.data();
  p.key = qkv.data() + kHeads * kHeadDim;
  p.cos_sin_cache = cos_sin.data();
  p.num_tokens = 1;
  p.num_query_heads = kHeads;
  p.num_kv_heads = kKvHeads;
  p.rotary_dim = p.cos_sin_stride = p.query_head_stride = p.key_head_stride = kHeadDim;
  p.query_stride = p.key_stride = kQkv;
  p.dtype = TECO_FLOAT32;
  require(teco_rotary_embedding(&p, kThreads));

  for (int64_t head = 0; head < kHeads + kKvHeads; ++head)
    for (int64_t i = 0; i < kHalf; ++i) {
      const int64_t x = head * kHeadDim + i, y = x + kHalf;
      const double cos = cos_sin[position * kHeadDim + i], sin = cos_sin[position * kHeadDim + kHalf + i];
      expect_close("rotary_embedding", qkv[x], before[x] * cos - before[y] * sin);
      expect_close("rotary_embedding", qkv[y], before[y] * cos + before[x] * sin);
    }
}

TecoKVCacheView cache_view(std::vector<float>& cache) {
  TecoKVCacheView view = {};
  view.data = cache.data();
  view.head_stride = kHeadDim;
  view.slot_stride = kKvHeads * kHeadDim;
  view.block_stride = kBlockSize * view.slot_stride;
  return view;
}

// The new token attends to the tokens that the cache holds, and to itself.
std::vector<float> attend(const std::vector<float>& qkv) {
  const int32_t block_table[] = {5, 0, 7, 2}, seq_len = kContext;
  const int64_t cache_size = kNumBlocks * kBlockSize * kKvHeads * kHeadDim;
  std::vector<float> keys = random_floats(cache_size), values = random_floats(cache_size);
  std::vector<float> out(kHeads * kHeadDim);
  const float* key = qkv.data() + kHeads * kHeadDim;
  const float* value = key + kKvHeads * kHeadDim;
  const int64_t slot = block_table[(kContext - 1) / kBlockSize] * kBlockSize + (kContext - 1) % kBlockSize;

  TecoReshapeAndCacheParams write = {};
  write.key = key;
  write.value = value;
  write.key_cache = cache_view(keys);
  write.value_cache = cache_view(values);
  write.slot_mapping = &slot;
  write.num_tokens = 1;
  write.num_kv_heads = kKvHeads;
  write.head_dim = write.key_head_stride = write.value_head_stride = kHeadDim;
  write.block_size = kBlockSize;
  write.key_stride = write.value_stride = kQkv;
  write.dtype = write.cache_dtype = TECO_FLOAT32;
  require(teco_reshape_and_cache(&write, kThreads));

  TecoPagedAttentionParams p = {};
  p.out = out.data();
  p.query = qkv.data();
  p.key_cache = write.key_cache;
  p.value_cache = write.value_cache;
  p.block_table = block_table;
  p.block_table_stride = 4;
  p.seq_lens = &seq_len;
  p.num_tokens = p.num_seqs = 1;
  p.num_heads = kHeads;
  p.num_kv_heads = kKvHeads;
  p.head_dim = p.query_head_stride = p.out_head_stride = kHeadDim;
  p.block_size = kBlockSize;
  p.query_stride = kQkv;
  p.out_stride = kHeads * kHeadDim;
  p.scale = 0.25f;
  p.causal = true;
  p.dtype = p.cache_dtype = TECO_FLOAT32;
  require(teco_paged_attention(&p, kThreads));

  for (int64_t head = 0; head < kHeads; ++head) {
    const int64_t kv_head = head / (kHeads / kKvHeads);
    const auto row_of = [&](const std::vector<float>& cache, int64_t t) {
      return &cache[((block_table[t / kBlockSize] * kBlockSize + t % kBlockSize) * kKvHeads + kv_head) * kHeadDim];
    };
    double total = 0, sums[kHeadDim] = {};
    for (int64_t t = 0; t < kContext; ++t) {
      const float* row = t == kContext - 1 ? key + kv_head * kHeadDim : row_of(keys, t);
      const double score = std::inner_product(row, row + kHeadDim, &qkv[head * kHeadDim], 0.);
      const double probability = std::exp(0.25 * score);
      total += probability;
      const float* value_row = t == kContext - 1 ? value + kv_head * kHeadDim : row_of(values, t);
      for (int64_t i = 0; i < kHeadDim; ++i) sums[i] += probability * value_row[i];
    }
    for (int64_t i = 0; i < kHeadDim; ++i) expect_close("paged_attention", out[head * kHeadDim + i], sums[i] / total);
  }
  return out;
}

int64_t next_token(const std::vector<float>& hidden, const std::vector<float>& head) {
  int64_t token = -1;
  float logit = 0;
  TecoLmHeadArgmaxParams p = {};
  p.argmax.token_ids = &token;
  p.argmax.logits = &logit;
  p.matmul.input = hidden.data();
  p.matmul.weight = head.data();
  p.matmul.weight_stride = kHidden;
  p.matmul.num_rows = 1;
  p.matmul.in_features = p.matmul.input_stride = kHidden;
  p.matmul.out_features = kVocab;
  p.matmul.dtype = p.matmul.weight_dtype = TECO_FLOAT32;
  require(teco_lm_head_argmax(&p, kThreads));

  for (int64_t n = 0; n < kVocab; ++n) {
    const double product = std::inner_product(hidden.begin(), hidden.end(), &head[n * kHidden], 0.);
    if (n == token) expect_close("lm_head_argmax", logit, product);
    if (product > logit + 1e-5) expect_close("lm_head_argmax", product, logit);
  }
  return token;
}

}  // namespace

int main() {
  if (teco_abi_version() != TECO_ABI_VERSION) {
    std::fprintf(stderr, "the library has version %d, the header %d\n", teco_abi_version(), TECO_ABI_VERSION);
    return 1;
  }
  const std::vector<float> hidden = norm(random_floats(kHidden, 3.f), random_floats(kHidden));
  std::vector<float> qkv = multiply(hidden, Checkpoint());
  rotate(qkv, kContext - 1);
  const int64_t token = next_token(attend(qkv), random_floats(kVocab * kHidden));
  std::printf("token %lld with %s\n", static_cast<long long>(token), teco_instruction_set());
}
