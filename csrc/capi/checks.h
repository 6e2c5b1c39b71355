// What can be told of params. Each check throws std::invalid_argument, naming the field;
// it returns whether there is anything to do.
#pragma once

#include "params.h"

namespace teco::capi {

bool check(const EmbeddingParams& p);
bool check(const GptqEmbeddingParams& p);
bool check(const RmsNormParams& p);
bool check(const SumRanksParams& p);
bool check(const SiluAndMulParams& p);
bool check(const RotaryEmbeddingParams& p);
bool check(const SampleParams& p);
bool check(const DenseMatmulParams& p);
bool check(const Sparse24MatmulParams& p);
bool check(const GptqMatmulParams& p);
bool check(const ReshapeAndCacheParams& p);
bool check(const CopyBlocksParams& p);
bool check(const PagedAttentionParams& p);
bool check(const MergeAttentionStatesParams& p);
bool check(const RecycleProjectParams& p);
bool check(const GptqRecycleProjectParams& p);
bool check(const LmHeadArgmaxParams& p);
bool check(const GptqLmHeadArgmaxParams& p);
bool check(const VerifyRecycledParams& p);
bool check(const VerifyRecycledSampledParams& p);

}  // namespace teco::capi
