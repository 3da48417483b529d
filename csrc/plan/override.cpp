// Reading an override: "residency=cluster,blocks=4".
#include <algorithm>
#include <array>
#include <charconv>
#include <stdexcept>
#include <string_view>

#include "planner.h"

namespace rnn_cuda {
namespace cuda {
namespace {

struct ResidencyName {
  const char* name;
  Residency value;
};
constexpr std::array<ResidencyName, 4> kResidencies = {{{"one_sm", Residency::OneSM},
                                                        {"cluster", Residency::Cluster},
                                                        {"grid", Residency::Grid},
                                                        {"streamed", Residency::Streamed}}};

struct ArithmeticName {
  const char* name;
  Arithmetic value;
};
constexpr std::array<ArithmeticName, 3> kArithmetics = {{{"fma", Arithmetic::FMA},
                                                         {"tensor_core", Arithmetic::TensorCore},
                                                         {"tf32", Arithmetic::TensorCoreTF32}}};

[[noreturn]] void refuse(std::string_view field, std::string_view value, const std::string& why) {
  throw std::invalid_argument("plan override: " + std::string(field) + "=" + std::string(value) +
                              ": " + why);
}

template <class Names>
auto value_of(const Names& names, std::string_view field, std::string_view text) {
  std::string known;
  for (const auto& entry : names) {
    if (text == entry.name) return entry.value;
    known += std::string(known.empty() ? "" : ", ") + entry.name;
  }
  refuse(field, text, "expected one of " + known);
}

int count_of(std::string_view field, std::string_view text) {
  int count = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), count);
  if (error != std::errc() || end != text.data() + text.size() || count < 1)
    refuse(field, text, "expected a positive integer");
  return count;
}

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
  return text;
}

}  // namespace

const char* name_of(Residency residency) { return kResidencies[static_cast<int>(residency)].name; }

const char* name_of(Arithmetic arithmetic) {
  return kArithmetics[static_cast<int>(arithmetic)].name;
}

const char* name_of(ScalarType dtype) {
  constexpr std::array<const char*, 4> kNames = {"float32", "float64", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}

std::string describe(const Plan& plan) {
  std::string text = std::string("residency=") + name_of(plan.residency) +
                     ",arithmetic=" + name_of(plan.arithmetic);
  if (plan.residency == Residency::Streamed) return text;
  const auto add = [&](const char* name, int value) {
    text += std::string(",") + name + "=" + std::to_string(value);
  };
  add("fuse_input", plan.fuse_input);
  add("blocks", plan.blocks);
  add("columns", plan.columns);
  add("engine_columns", plan.engine_columns);
  add("row_warps", plan.row_warps);
  add("depth_split", plan.depth_split);
  return text;
}

Override Override::parse(const std::string& text) {
  struct Count {
    const char* name;
    std::optional<int> Override::* field;
  };
  constexpr std::array<Count, 5> kCounts = {{{"blocks", &Override::blocks},
                                             {"columns", &Override::columns},
                                             {"engine_columns", &Override::engine_columns},
                                             {"row_warps", &Override::row_warps},
                                             {"depth_split", &Override::depth_split}}};
  Override override;
  override.text = text;
  std::string_view rest = text;
  while (!trimmed(rest).empty()) {
    const size_t comma = std::min(rest.find(','), rest.size());
    const std::string_view item = trimmed(rest.substr(0, comma));
    rest.remove_prefix(std::min(comma + 1, rest.size()));
    const size_t equals = item.find('=');
    if (equals == std::string_view::npos)
      throw std::invalid_argument(
          "plan override: expected field=value, separated by commas; got '" + std::string(item) +
          "'");
    const std::string_view field = trimmed(item.substr(0, equals));
    const std::string_view value = trimmed(item.substr(equals + 1));
    const auto count = std::find_if(kCounts.begin(), kCounts.end(),
                                    [&](const Count& entry) { return field == entry.name; });
    if (field == "residency") {
      override.residency = value_of(kResidencies, field, value);
    } else if (field == "arithmetic") {
      override.arithmetic = value_of(kArithmetics, field, value);
    } else if (field == "fuse_input") {
      if (value != "0" && value != "1") refuse(field, value, "expected 0 or 1");
      override.fuse_input = value == "1";
    } else if (count != kCounts.end()) {
      override.*(count->field) = count_of(field, value);
    } else {
      refuse(field, value,
             "no such field; expected residency, arithmetic, fuse_input, blocks, columns, "
             "engine_columns, row_warps or depth_split");
    }
  }
  return override;
}

}  // namespace cuda
}  // namespace rnn_cuda
