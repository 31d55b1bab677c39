// A device for tests: it computes on the CPU, and refuses what GPUs refuse and rounds what they round.
//
// - Operators on tensors of this device and of the CPU raise; numbers without axes and indices may be the CPU's.
// - Convolutions round their factors to TF32 unless torch.backends.cudnn says otherwise, matrix products where it is allowed.
// - Pinned memory, which `.to("cpu", non_blocking=True)` asks for, raises: nobody waits for what is copied there.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <set>
#include <string>

namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::SymIntArrayRef;

constexpr auto kind = c10::DeviceType::PrivateUse1;
const c10::Device the_device(kind, 0);

struct Allocator final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {data, data, &c10::free_cpu, the_device};
  }
  at::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Allocator allocator;
REGISTER_ALLOCATOR(kind, &allocator)

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kind; }
  c10::Device exchangeDevice(c10::Device) const override { return the_device; }
  c10::Device getDevice() const override { return the_device; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, the_device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(); }
  at::Device getDeviceFromPtr(void*) const override { return the_device; }
};
const bool hooks_are_registered = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

// The same memory as a tensor of the CPU.
Tensor on_cpu(const Tensor& t) {
  if (t.device().type() != kind) return t;
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), at::TensorOptions().dtype(t.dtype()));
}

// Memory.

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const Tensor& resize(const Tensor& self, SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), C10_AS_INTARRAYREF_SLOW(size), std::nullopt);
  return self;
}

// Views, which must share memory, so that they cannot be left to the CPU.

Tensor as_strided(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(self, size, stride, offset);
}

Tensor view(const Tensor& self, SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshape_alias(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor unfold(const Tensor& self, int64_t axis, int64_t size, int64_t step) {
  return at::native::unfold(self, axis, size, step);
}

Tensor& set_view(Tensor& self, at::Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::cpu::set_(self, source, offset, size, stride);
}

Tensor& set_storage(Tensor& self, at::Storage source) {
  const auto entries = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_view(self, source, 0, {entries}, {1});
}

// Products.

bool allows_tf32(at::Float32Op op) {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, op) == at::Float32Precision::TF32;
}

Tensor rounded(const Tensor& t, bool allowed) {  // to TF32's 11 bits
  if (!allowed || t.scalar_type() != at::kFloat) return t;
  return t.contiguous().view(at::kInt).add(0x1000).bitwise_and(~0x1fff).view(at::kFloat);
}

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups) {
  const bool biased = bias && bias->defined();
  TORCH_CHECK(x.device() == weight.device() && (!biased || bias->device() == x.device()),
              "Expected all tensors to be on the same device, but convolution got several");
  const bool allowed = allows_tf32(at::Float32Op::CONV);
  return at::convolution(rounded(on_cpu(x), allowed), rounded(on_cpu(weight), allowed),
                         biased ? std::optional<Tensor>(on_cpu(*bias)) : std::nullopt, stride, padding, dilation,
                         transposed, output_padding, groups).to(the_device);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  const IntArrayRef of_bias(gradient.sizes().data() + 1, 1);
  auto [dx, dweight, dbias] = at::convolution_backward(on_cpu(gradient), on_cpu(x), on_cpu(weight), of_bias, stride, padding,
                                                       dilation, transposed, output_padding, groups, mask);
  const auto back = [](const Tensor& t) { return t.defined() ? t.to(the_device) : t; };
  return {back(dx), back(dweight), back(dbias)};
}

// Everything else: checked, and computed by the CPU on copies.

void require_one_device(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  static const std::set<std::string> take_indices{
      "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};
  const std::string& name = op.schema().name();
  const size_t first = stack.size() - op.schema().arguments().size();
  bool here = false, there = false;
  const auto see = [&](const Tensor& t, bool may_be_number, bool may_be_index) {
    if (!t.defined()) return;
    if (t.device().type() == kind) there = true;
    else if (!(may_be_number && t.dim() == 0) && !(may_be_index && take_indices.count(name))) here = true;
  };
  for (size_t i = first; i < stack.size(); ++i) {
    const auto& value = stack[i];
    if (value.isTensor()) {
      see(value.toTensor(), i != first || name.back() != '_', false);
    } else if (value.isTensorList()) {
      for (const Tensor& t : value.toTensorList()) see(t, true, true);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<Tensor>& t : value.toOptionalTensorList()) {
        if (t) see(*t, true, true);
      }
    }
  }
  TORCH_CHECK(!(here && there), "Expected all tensors to be on the same device, but ", name, " got tensors of ", the_device,
              " and of the cpu");
}

void round_factors(const c10::OperatorHandle& op, torch::jit::Stack& stack) {
  static const std::set<std::string> products{"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"};
  const auto& name = op.schema().name();
  if (!products.count(name) || !allows_tf32(at::Float32Op::MATMUL)) return;
  const size_t first = stack.size() - op.schema().arguments().size() + (name.find("add") != std::string::npos);
  for (size_t i = first; i < first + 2; ++i) stack[i] = rounded(on_cpu(stack[i].toTensor()), true).to(the_device);
}

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  require_one_device(op, *stack);
  round_factors(op, *stack);
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &unfold);
  m.impl("set_.source_Storage_storage_offset", &set_view);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

}  // namespace
