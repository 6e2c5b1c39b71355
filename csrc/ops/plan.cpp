#include "ops/plan.h"

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace teco::ops {
namespace {

using Calls = std::vector<KernelCall>;

thread_local std::optional<Calls> recorded;

std::mutex plans_mutex;
std::map<int64_t, std::shared_ptr<const Calls>> plans;
int64_t last_plan = 0;

std::shared_ptr<const Calls> find_plan(int64_t plan) {
  const std::lock_guard lock(plans_mutex);
  const auto found = plans.find(plan);
  require(found != plans.end(), "plan: there is none with number ", plan);
  return found->second;
}

}  // namespace

bool recording() {
  return recorded.has_value();
}

void record(KernelCall call) {
  recorded->push_back(std::move(call));
}

void plan_begin() {
  require(!recorded, "plan: this thread is recording one already");
  recorded.emplace();
}

int64_t plan_end() {
  require(recorded.has_value(), "plan: this thread is not recording one");
  auto calls = std::make_shared<const Calls>(std::move(*recorded));
  recorded.reset();
  const std::lock_guard lock(plans_mutex);
  plans.emplace(++last_plan, std::move(calls));
  return last_plan;
}

void plan_run(int64_t plan) {
  const std::shared_ptr<const Calls> calls = find_plan(plan);
  const int threads = num_threads();
  for (const KernelCall& call : *calls) call(threads);
}

void plan_free(int64_t plan) {
  const std::lock_guard lock(plans_mutex);
  plans.erase(plan);
}

}  // namespace teco::ops
