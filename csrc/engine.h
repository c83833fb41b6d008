// The seam: everything that the JAX half and the torch half share.
//
// A C ABI, so that the two shared libraries share no C++ symbol, no exception and no allocator. The
// torch half exports one function, `torchcall_engine_api`, which returns a table of entry points.
// Every entry point reports failure by writing a message to the caller's sink; none throws.

#ifndef TORCHCALL_ENGINE_H_
#define TORCHCALL_ENGINE_H_

#include <stddef.h>
#include <stdint.h>

#include "dlpack.h"

#ifdef __cplusplus
extern "C" {
#endif

// Raised whenever a struct or a signature below changes.
#define TC_ABI_VERSION 11

typedef struct TcModel TcModel;
typedef struct TcPlan TcPlan;
typedef struct TcHold TcHold;

// Receives text (an error message or a report). May be called at most once per entry-point call.
typedef struct {
  void* self;
  void (*write)(void* self, const char* text, size_t size);
} TcSink;

typedef enum {
  TC_OK = 0,
  TC_FAILED = 1,
  TC_NOT_CAPTURABLE = 2,  // the observed call succeeded, but such calls cannot be captured
} TcStatus;

// One node of a pytree in preorder: a container is followed by its `size` children, a dict by
// `size` pairs of a key node and a value node.
typedef enum {
  TC_TENSOR = 0,  // `integer` is the position among the inputs (or the outputs)
  TC_INT = 1,
  TC_FLOAT = 2,
  TC_BOOL = 3,
  TC_STRING = 4,
  TC_NONE = 5,
  TC_LIST = 6,
  TC_TUPLE = 7,
  TC_DICT = 8,
} TcNodeKind;

typedef struct {
  TcNodeKind kind;
  int64_t size;
  int64_t integer;
  double real;
  const char* text;  // of TC_STRING: `size` bytes
} TcNode;

typedef struct {
  int32_t freeze;         // torch.jit.freeze the private copy
  int32_t requires_grad;  // the model differentiates inside its forward
} TcModelOptions;

// Properties of a loaded model. Strings live as long as the model.
typedef struct {
  const char* name;
  const char* schema;            // of a package: its call spec, as torch writes it
  uint64_t fingerprint;          // of the method's graph or call spec, the same in every process
  int32_t differentiates;        // calls torch.autograd.grad or backward
  int32_t changes_state;         // assigns attributes or mutates containers
  int32_t draws_random_numbers;  // any node that is nondeterministic from a seed
  int32_t training;              // the module is in training mode
} TcModelInfo;

// An int32 scalar input with the number of valid entries of padded axes. The model does not get it.
// It sees max(valid + extra, least) entries of every axis that this length narrows, and never more
// than the axis has.
typedef struct {
  int64_t input;
  int64_t extra;
  int64_t least;
} TcLength;

// The axis of an input or output that a length narrows. An output is narrowed along axis 0 only;
// the rest of it is filled with zeros.
typedef struct {
  int32_t length;  // position among the plan's lengths, -1: not narrowed
  int32_t axis;
} TcNarrowing;

// Which entries an input of integers may have. Calls on a CPU check it before the model runs;
// elsewhere reading an entry would mean waiting for the device.
typedef struct {
  int64_t input;
  // Entries are rows of this input: from 0 to the size of its axis 0, as the model sees it.
  // -1: they are from 0 to 127, those whose bits are set in `allowed`.
  int64_t rows_of;
  uint64_t allowed[2];
} TcIndexCheck;

// An input that the model uses in the place of a parameter of its module. Parameters are the first
// inputs, and are no arguments of the model. A parameter with several names has an entry for each.
typedef struct {
  int64_t input;
  const char* name;  // as in "layers.0.weight"
} TcParameter;

// A vector-Jacobian product: the gradients of Σ ⟨cotangent, output⟩ over some outputs of a function
// with respect to some of its inputs. The result is a function again: of the same inputs, followed
// by one cotangent per output of the list, and with one output per input of the list, which follow
// the function's own if `keeps_outputs` is not 0.
typedef struct {
  const int64_t* inputs;
  int64_t num_inputs;
  const int64_t* outputs;
  int64_t num_outputs;
  int32_t keeps_outputs;
} TcDerivative;

// The code of an eager model, which the JAX half runs, for one plan. Any thread may call it,
// several at once; each call has its own frame. Addresses of tensors are those of at::TensorImpl.
typedef struct {
  void* self;  // NULL: not an eager model
  // Begins a call. Makes the tensors that the model gets, new ones for every call, one per input,
  // on the device, of the input's shape and of the dtype that it is cast to; without elements for
  // an input that is shared, NULL for a length. They live until `close`, which follows every
  // `open` that succeeds, on the same thread.
  TcStatus (*open)(void* self, DLDevice device, int64_t num_inputs, void** frame, void** tensors,
                   TcSink error);
  // Runs the model on the frame's tensors. The outputs live until `release_outputs` or `close`.
  TcStatus (*run)(void* self, void* frame, void** outputs, int64_t num_outputs, TcSink error);
  // Releases the outputs. retained[i] becomes 1 where Python refers to input i elsewhere.
  void (*release_outputs)(void* self, void* frame, int32_t* retained);
  void (*close)(void* self, void* frame);
  void (*release)(void* self);
  // Holds the tensors that the model reads on the device now. They must be released before
  // `release` is called.
  TcStatus (*hold)(void* self, DLDevice device, void** held, TcSink error);
  void (*release_held)(void* self, void* held);
} TcEager;

// Everything about one call that is fixed when the JAX program is traced. Pointers are read only
// during `plan_create`.
typedef struct {
  const DLTensor* inputs;   // shapes and dtypes of XLA's operands, which are the inputs here
  const DLDataType* casts;  // per input; bits == 0: no cast
  const TcNarrowing* input_narrowings;
  const int32_t* input_copies;  // per input: whether the model always gets a private copy
  const char* const* input_names;
  int64_t num_inputs;
  const DLTensor* outputs;
  const TcNarrowing* output_narrowings;
  const char* const* output_names;
  int64_t num_outputs;
  const TcLength* lengths;
  int64_t num_lengths;
  const TcNode* arguments;  // a tuple (positional) and a dict (keywords), in preorder
  int64_t num_arguments;
  const TcNode* results;  // the structure that the model must return
  int64_t num_results;
  int32_t selects_outputs;  // dicts may hold further keys, and floats are cast to the outputs'
  const TcIndexCheck* index_checks;
  int64_t num_index_checks;
  const TcParameter* parameters;  // of a TorchScript module; ordered by input
  int64_t num_parameters;
  // Applied to the model one after the other; the plan's inputs and outputs are the last one's.
  const TcDerivative* derivatives;
  int64_t num_derivatives;
  TcEager eager;  // of an eager model; a plan that was created releases it
} TcPlanSpec;

// Counts of what a model's calls did beside computing.
typedef struct {
  int64_t retained_inputs;  // inputs that the model retained, each given a private copy
  int64_t copied_inputs;    // inputs handed over as private copies
} TcModelCounters;

typedef enum {
  TC_COMPUTE = 0,
  // As TC_COMPUTE; returns TC_NOT_CAPTURABLE and a reason if the model retained an input.
  TC_OBSERVE = 1,
  // The call is, or prepares for, the capture of a CUDA graph: what it uses beside the buffers is
  // allocated within the call and used by no other one. A model that retains an input fails.
  TC_RECORD = 2,
} TcPurpose;

// Where a call runs, and what for. On a CPU `stream` is NULL. On a CUDA device it is a
// cudaStream_t: the call enqueues there and does not wait, except for the first call on a device,
// which moves the weights.
typedef struct {
  DLDevice device;
  void* stream;
  TcPurpose purpose;
} TcPlace;

typedef struct {
  uint32_t abi_version;
  const char* torch_version;
  const void* script_module_type;    // const std::type_info*
  const void* script_function_type;  // const std::type_info*

  // Models. `live` points to a torch::jit::Module or a StrongFunctionPtr and is read at once.
  TcStatus (*model_from_file)(const char* path, TcModelOptions options, TcModel** out,
                              TcSink error);
  TcStatus (*model_from_bytes)(const char* data, size_t size, TcModelOptions options, TcModel** out,
                               TcSink error);
  TcStatus (*model_from_live_module)(const void* live, TcModelOptions options, TcModel** out,
                                     TcSink error);
  TcStatus (*model_from_live_function)(const void* live, TcModelOptions options, TcModel** out,
                                       TcSink error);
  // An AOTInductor package, which must have been compiled for this torch and this machine. It is
  // loaded on `home`, and from the file again on each further device of that kind. On a CPU up to
  // `num_runners` calls run at once, elsewhere one per device.
  TcStatus (*model_from_package)(const char* path, DLDevice home, int32_t num_runners,
                                 TcModel** out, TcSink error);
  // An eager model: each of its plans brings its code, `TcPlanSpec::eager`.
  TcStatus (*model_of_eager)(const char* name, TcModelOptions options, TcModel** out, TcSink error);
  // Replaces weights and code by those of `fresh`. Calls under way finish with the old ones.
  TcStatus (*model_replace)(TcModel* model, TcModel* fresh, TcSink error);
  TcStatus (*model_info)(TcModel* model, TcModelInfo* out, TcSink error);
  // Writes the bytes of a TorchScript archive that holds the module, its weights included.
  TcStatus (*model_serialize)(TcModel* model, TcSink out, TcSink error);
  void (*model_counters)(const TcModel* model, TcModelCounters* out);
  void (*model_release)(TcModel* model);

  // Whether the model's signature takes these arguments (a tuple and a dict, as in TcPlanSpec), in
  // which `num_inputs` tensors occur.
  TcStatus (*model_check_arguments)(TcModel* model, const TcNode* arguments, int64_t num_arguments,
                                    int64_t num_inputs, TcSink error);

  // Plans.
  TcStatus (*plan_create)(TcModel* model, const TcPlanSpec* spec, TcPlan** out, TcSink error);
  TcStatus (*plan_run)(TcPlan* plan, const DLTensor* inputs, const DLTensor* outputs, TcPlace place,
                       TcSink error);
  // Torch's threads in the plan's calls from now on, calls under way excepted. 0: those of
  // `set_num_threads`, as in a new plan. Another number has no effect where torch lacks OpenMP.
  void (*plan_set_threads)(TcPlan* plan, int32_t threads);
  // Code and weights as the plan's calls on the device use them now; they live until the hold is
  // released, which is before the plan is.
  TcStatus (*plan_hold)(TcPlan* plan, DLDevice device, TcHold** out, TcSink error);
  void (*hold_release)(TcHold* hold);
  void (*plan_release)(TcPlan* plan);

  // Threads that torch may use inside one call; every thread applies it before its next call.
  void (*set_num_threads)(int32_t threads);
} TcEngineApi;

typedef const TcEngineApi* (*TcEngineApiFunction)(void);

#ifdef __cplusplus
}
#endif

#endif  // TORCHCALL_ENGINE_H_
