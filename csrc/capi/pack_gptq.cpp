// A GPTQ checkpoint's tensors, packed as gptq_matmul reads them (the layout is described at GptqMatmulParams). Done
// once, when a model is loaded: written to be read.
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "capi/guard.h"

namespace teco::capi {
namespace {

constexpr int64_t kPanel = 16, kBlock = 32, kQuads = 8;
constexpr int64_t kHeaderBytes = 64;

int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

void check(const TecoGptqCheckpoint& c) {
  require_bits(c.bits);
  for (const auto& [field, size] :
       {std::pair{"in_features", c.in_features}, {"out_features", c.out_features}, {"num_groups", c.num_groups}})
    require(size >= 1 && size <= std::numeric_limits<int32_t>::max(), field, ": expected 1 to 2^31 - 1, got ", size);
  require(c.in_features * c.bits % 32 == 0, "in_features: expected codes of ", c.bits,
          " bits that fill whole words of 32, got ", c.in_features);
  require(c.out_features * c.bits % 32 == 0, "out_features: expected zero points of ", c.bits,
          " bits that fill whole words of 32, got ", c.out_features);
  require_pointers({{"qweight", c.qweight}, {"qzeros", c.qzeros}, {"scales", c.scales}});
  if (!c.g_idx) {
    require(c.in_features % c.num_groups == 0,
            "num_groups: expected a number that divides in_features = ", c.in_features, ", as there is no g_idx, got ",
            c.num_groups);
  }
  for (int64_t k = 0; c.g_idx && k < c.in_features; ++k)
    require(c.g_idx[k] >= 0 && c.g_idx[k] < c.num_groups, "g_idx[", k, "]: expected 0 to ", c.num_groups - 1, ", got ",
            c.g_idx[k]);
  for (int64_t i = 0; i < c.num_groups * c.out_features; ++i)
    require((c.scales[i] & 0x7c00) != 0x7c00, "scales[", i / c.out_features, "][", i % c.out_features,
            "]: expected a finite number, got NaN or infinity");
}

// Code `index` of a string of bits whose words lie `stride` apart.
uint32_t code_at(const uint32_t* words, int64_t stride, int64_t index, int bits) {
  const int64_t word = index * bits / 32;
  const int shift = static_cast<int>(index * bits % 32);
  uint32_t code = words[word * stride] >> shift;
  if (shift + bits > 32) code |= words[(word + 1) * stride] << (32 - shift);
  return code & ((1u << bits) - 1);
}

// The inputs in packed order: group by group, each in the order of the checkpoint, filled up with -1.
struct Order {
  std::vector<int32_t> inputs;
  int64_t blocks_per_group;
  bool is_identity;

  explicit Order(const TecoGptqCheckpoint& c) {
    std::vector<std::vector<int32_t>> groups(static_cast<size_t>(c.num_groups));
    const int64_t group_size = c.in_features / c.num_groups;
    for (int64_t k = 0; k < c.in_features; ++k)
      groups[static_cast<size_t>(c.g_idx ? c.g_idx[k] : k / group_size)].push_back(static_cast<int32_t>(k));
    size_t largest = 0;
    for (const auto& group : groups) largest = std::max(largest, group.size());
    blocks_per_group = round_up(static_cast<int64_t>(largest), kBlock) / kBlock;
    for (const auto& group : groups) {
      inputs.insert(inputs.end(), group.begin(), group.end());
      inputs.insert(inputs.end(), static_cast<size_t>(blocks_per_group * kBlock) - group.size(), -1);
    }
    is_identity = static_cast<int64_t>(inputs.size()) == c.in_features && std::is_sorted(inputs.begin(), inputs.end());
  }
};

struct Packed {
  explicit Packed(const TecoGptqCheckpoint& c) : checkpoint(c), order(c) {}

  int64_t block_bytes() const { return checkpoint.bits * 64; }
  int64_t group_bytes() const { return kHeaderBytes + order.blocks_per_group * block_bytes(); }
  int64_t num_panels() const { return round_up(checkpoint.out_features, kPanel) / kPanel; }
  int64_t bytes() const { return num_panels() * checkpoint.num_groups * group_bytes(); }

  void write_header(uint8_t* header, int64_t group, int64_t first_column) const {
    const TecoGptqCheckpoint& c = checkpoint;
    for (int64_t n = 0; n < kPanel && first_column + n < c.out_features; ++n) {
      const int64_t column = first_column + n;
      const int64_t words_per_group = c.out_features * c.bits / 32;
      const uint32_t zero = code_at(c.qzeros + group * words_per_group, 1, column, c.bits) + c.stores_zero_minus_one;
      const uint16_t half = half_of(zero);
      std::memcpy(header + 2 * n, &c.scales[group * c.out_features + column], 2);
      std::memcpy(header + 32 + 2 * n, &half, 2);
    }
  }

  void write_block(uint8_t* block, const int32_t* inputs, int64_t first_column) const {
    const TecoGptqCheckpoint& c = checkpoint;
    const int64_t whole = kQuads / c.bits;  // quads that lie whole in a word
    for (int64_t n = 0; n < kPanel && first_column + n < c.out_features; ++n)
      for (int64_t i = 0; i < kBlock; ++i) {
        if (inputs[i] < 0) continue;
        const uint32_t code = code_at(c.qweight + first_column + n, c.out_features, inputs[i], c.bits);
        const int64_t quad = i / 4, byte = n * 4 + i % 4;
        const auto put = [&](int64_t word, uint32_t value) { block[word * 64 + byte] |= static_cast<uint8_t>(value); };
        if (quad < c.bits * whole) {
          put(quad / whole, code << (quad % whole * c.bits));
        } else {  // 3 bits: quads 6 and 7
          put(quad - 6, (code & 3) << 6);
          put(2, (code >> 2) << quad);
        }
      }
  }

  void write(uint8_t* weight) const {
    std::memset(weight, 0, static_cast<size_t>(bytes()));
    for (int64_t panel = 0; panel < num_panels(); ++panel)
      for (int64_t group = 0; group < checkpoint.num_groups; ++group, weight += group_bytes()) {
        write_header(weight, group, panel * kPanel);
        for (int64_t block = 0; block < order.blocks_per_group; ++block)
          write_block(weight + kHeaderBytes + block * block_bytes(),
                      &order.inputs[static_cast<size_t>((group * order.blocks_per_group + block) * kBlock)],
                      panel * kPanel);
      }
  }

  // fp16 of an integer up to 256.
  static uint16_t half_of(uint32_t value) {
    if (value == 0) return 0;
    const int exponent = 31 - __builtin_clz(value);
    return static_cast<uint16_t>((15 + exponent) << 10 | ((value << (10 - exponent)) & 0x3ff));
  }

  const TecoGptqCheckpoint& checkpoint;
  Order order;
};

const TecoGptqCheckpoint& checked(const TecoGptqCheckpoint* checkpoint) {
  require_pointers({{"checkpoint", checkpoint}});
  check(*checkpoint);
  return *checkpoint;
}

}  // namespace
}  // namespace teco::capi

using teco::capi::checked;
using teco::capi::guarded;
using teco::capi::Packed;
using teco::capi::require_pointers;

TecoStatus teco_gptq_packed_size(const TecoGptqCheckpoint* checkpoint, TecoGptqPackedSize* size) {
  return guarded([&] {
    const Packed packed(checked(checkpoint));
    require_pointers({{"size", size}});
    *size = {packed.order.blocks_per_group, packed.bytes(), static_cast<int64_t>(packed.order.inputs.size()),
             !packed.order.is_identity};
  });
}

TecoStatus teco_gptq_pack(const TecoGptqCheckpoint* checkpoint, uint8_t* weight, int32_t* input_order) {
  return guarded([&] {
    const Packed packed(checked(checkpoint));
    require_pointers({{"weight", weight}});
    if (!packed.order.is_identity) require_pointers({{"input_order", input_order}});
    packed.write(weight);
    if (input_order) std::copy(packed.order.inputs.begin(), packed.order.inputs.end(), input_order);
  });
}
